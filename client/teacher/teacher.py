"""The teacher service from Python: generates text, scores sequences, manages adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from stillhouse.client.core.connection import PATIENCE_S, OnLost
from stillhouse.client.core.errors import file_errors
from stillhouse.client.teacher.connection import TeacherConnection
from stillhouse.client.teacher.generate import Completion, Gathering, Piece, Prompt, as_prompt, pieces
from stillhouse.client.teacher.score import ScoreAnswer, Sequenced, score
from stillhouse.protos.files.adapter import FILES, upload_requests
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor

LOAD_TIMEOUT_S = 600.0


class Teacher(TeacherConnection):
    """The teacher at `target`, `host:port` or `unix:PATH`; a context manager.

    With `tls_ca` or a certificate the connection is TLS. Every method raises StillhouseError with a sentence that
    names a remedy; TEACHER_UNREACHABLE if no service responds.
    """

    def save_tokenizer(self, directory: Path | str) -> list[Path]:
        """Downloads the tokenizer's files into `directory` and returns their paths."""
        directory = Path(directory)
        paths = []
        for name, content in self.tokenizer().items():
            path = directory / name
            with file_errors("write", path):
                directory.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            paths.append(path)
        return paths

    def generate(
        self,
        prompts: Iterable[Prompt],
        *,
        num_samples: int = 1,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        adapter: str = "",
        top_k_logprobs: int = 0,
        date: str = "",
    ) -> Iterator[Piece]:
        """Streams pieces of samples as they are generated; in order within a sample, interleaved between samples.

        A prompt is text, token ids, or messages with `role` and `content`, which the teacher's chat template renders.
        A template that asks for the date is told `date`, such as "2025-01-31"; empty means the teacher's own day.
        With `top_k_logprobs` each piece has the distributions of its tokens. None takes the contract's default:
        temperature 1, top_p 1, all tokens, 256 new tokens. At most `max_prompts` of the teacher are in flight.
        Closing the iterator aborts the remaining samples.
        """
        sampling = teacher_pb2.SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            max_new_tokens=max_new_tokens,
            seed=seed,
            stop=stop,
        )
        request = teacher_pb2.GenerateRequest(sampling=sampling, num_samples=num_samples)
        if top_k_logprobs:
            request.distributions.top_k = top_k_logprobs
            request.distributions.logprob_dtype = Tensor.DATA_TYPE_FLOAT32
        return pieces(self, (as_prompt(each, adapter, date) for each in prompts), request)

    def complete(self, prompts: Iterable[Prompt], **options: Any) -> Iterator[Completion]:
        """Yields complete samples as they finish; options as for generate()."""
        gathering = Gathering()
        for piece in self.generate(prompts, **options):
            completion = gathering.add(piece)
            if completion is not None:
                yield completion

    def score(
        self,
        sequences: Iterable[Sequenced],
        *,
        top_k: int = 0,
        temperatures: Sequence[float] = (),
        num_sampled_tokens: int = 0,
        seed: int = 0,
        sample_tail: bool = False,
        sample_temperature: float = 1.0,
        sampled_logprobs: bool = False,
        stratified_samples: bool = False,
        entropy: bool = False,
        float16: bool = False,
        compact: bool = False,
        pack_token_ids: bool = False,
        max_inflight: int = 0,
        on_lost: OnLost | None = None,
        patience_s: float = PATIENCE_S,
    ) -> Iterator[ScoreAnswer]:
        """Yields each sequence's distributions or its own error, as they are ready.

        A sequence is a ScoreItem or a pair of id and token ids [T]. `sequences` is read in another thread, at most
        `max_inflight` ahead of the results (0, or more than the teacher's limit, means that limit). A lost stream is
        opened again and unscored sequences are sent again. Logprobs travel as float32 unless `float16`, or
        `compact`: about three bits each, with a reconstruction KL of 1e-5 to 1e-4 nats, from teachers with
        CAPABILITY_COMPACT_LOGPROBS. With `compact` or `pack_token_ids` ids travel in the fewest bits that hold the
        vocabulary, and stratified samples always in few.
        """
        dtype = Tensor.DATA_TYPE_FLOAT16 if float16 else Tensor.DATA_TYPE_FLOAT32
        config = teacher_pb2.DistributionConfig(
            top_k=top_k,
            logprob_dtype=Tensor.DATA_TYPE_FALLING if compact else dtype,
            temperatures=temperatures,
            num_sampled_tokens=num_sampled_tokens,
            seed=seed,
            sample_tail=sample_tail,
            sample_temperature=sample_temperature,
            sampled_logprobs=sampled_logprobs,
            stratified_samples=stratified_samples,
            sort_samples=stratified_samples,
            entropy=entropy,
            pack_token_ids=pack_token_ids or compact,
        )
        return score(
            self, sequences, config, max_inflight=max_inflight, on_lost=on_lost, patience_s=patience_s
        )

    def load_adapter(self, name: str, path: str) -> teacher_pb2.Adapter:
        """Loads the LoRA adapter in the directory `path` on the teacher's host under `name`."""
        request = teacher_pb2.LoadAdapterRequest(adapter=name, path=path)
        return self.call(self.stub.LoadAdapter, request, timeout_s=LOAD_TIMEOUT_S).adapter

    def unload_adapter(self, name: str) -> None:
        """Unloads the adapter `name`; the name stays bound to its weights."""
        request = teacher_pb2.UnloadAdapterRequest(adapter=name)
        self.call(self.stub.UnloadAdapter, request, timeout_s=LOAD_TIMEOUT_S)

    def upload_adapter(
        self, directory: Path | str, *, on_bytes: Callable[[int], None] | None = None
    ) -> teacher_pb2.UploadAdapterResponse:
        """Copies adapter_config.json and adapter_model.safetensors to the teacher's host, for load_adapter()."""
        for name in FILES:
            with file_errors("read", Path(directory) / name):
                (Path(directory) / name).open("rb").close()
        requests = upload_requests(Path(directory), on_bytes or (lambda _: None))
        return self.call(self.stub.UploadAdapter, requests, timeout_s=LOAD_TIMEOUT_S)
