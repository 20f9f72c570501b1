# syntax=docker/dockerfile:1
# One target a role: `docker build --target teacher-cuda | teacher-cpu | trainer | client .`
# Rule: an image holds the wheel and what its role needs, runs as a user without rights, and keeps its data below /data.
# The health checks are calls of the client: with TLS or tokens, give the service's container STILLHOUSE_TLS_CA,
# STILLHOUSE_TLS_SERVER_NAME and STILLHOUSE_TOKEN_FILE too.

FROM python:3.11-slim-bookworm AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY stillhouse/ stillhouse/
COPY protos/ protos/
COPY teacher_service/ teacher_service/
COPY student_trainer/ student_trainer/
COPY client/ client/
RUN python -m pip wheel --quiet --no-deps --wheel-dir /dist .

FROM python:3.11-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/data/huggingface \
    VLLM_NO_USAGE_STATS=1 \
    DO_NOT_TRACK=1
RUN useradd --create-home --uid 10001 stillhouse \
    && install --directory --owner=stillhouse --group=stillhouse /data
COPY requirements/dev-cpu.lock /opt/stillhouse/cpu.lock
COPY --from=wheel /dist/ /opt/stillhouse/dist/
WORKDIR /data

FROM base AS client
RUN pip install --constraint /opt/stillhouse/cpu.lock /opt/stillhouse/dist/*.whl
USER 10001
ENTRYPOINT ["stillhouse"]
CMD ["--help"]

FROM base AS teacher-cpu
# vLLM's kernels place memory with libnuma.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/*
# vLLM names the last three for images and sound; PyPI's builds of them are for CUDA and break beside torch's CPU build.
RUN pip install --constraint /opt/stillhouse/cpu.lock --extra-index-url https://download.pytorch.org/whl/cpu \
        "$(ls /opt/stillhouse/dist/*.whl)[teacher-cpu,teacher-hf]" \
    && pip uninstall --yes torchvision torchaudio torchcodec
USER 10001
VOLUME /data
EXPOSE 7401 7501
HEALTHCHECK --interval=30s --timeout=20s --start-period=15m --start-interval=5s --retries=4 \
    CMD ["stillhouse", "--teacher", "127.0.0.1:7401", "teacher", "info"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["stillhouse-teacher"]
CMD ["--help"]

FROM base AS teacher-cuda
# The wheels bring CUDA's libraries, the host its driver; Triton compiles small programs with gcc when it starts.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libnuma1 \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN pip install "$(ls /opt/stillhouse/dist/*.whl)[teacher]"
USER 10001
VOLUME /data
EXPOSE 7401 7501
HEALTHCHECK --interval=30s --timeout=20s --start-period=15m --start-interval=5s --retries=4 \
    CMD ["stillhouse", "--teacher", "127.0.0.1:7401", "teacher", "info"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["stillhouse-teacher"]
CMD ["--help"]

FROM base AS trainer
# The default build of torch is for CUDA; --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu takes the small one.
ARG TORCH_INDEX=https://pypi.org/simple
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN pip install --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple "torch>=2.8" \
    && pip install "$(ls /opt/stillhouse/dist/*.whl)[trainer,postgres]"
USER 10001
VOLUME /data
EXPOSE 7402 7502
HEALTHCHECK --interval=30s --timeout=20s --start-period=2m --start-interval=5s --retries=4 \
    CMD ["stillhouse", "--trainer", "127.0.0.1:7402", "run", "list"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["stillhouse-trainer", "--data-dir", "/data"]
CMD ["--listen", "127.0.0.1:7402"]
