"""The teacher service from Python: what it serves, text that it writes, and the distributions it gives to your text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from stillhouse.client.core.connection import PATIENCE_S, Connection, OnLost
from stillhouse.client.core.errors import file_error
from stillhouse.client.core.settings import DEFAULT_TEACHER
from stillhouse.client.teacher.generate import Completion, Gathering, Piece, as_prompt, pieces
from stillhouse.client.teacher.score import ScoreAnswer, Sequenced, score
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.adapter import FILES, upload_requests
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.stillhouse.v1.teacher_pb2_grpc import TeacherServiceStub
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor

LOAD_TIMEOUT_S = 600.0
MAX_TOKENIZER_BYTES = 256 << 20

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]] | teacher_pb2.Prompt


class Teacher(Connection):
    """The teacher at `target`, `host:port` or `unix:PATH`; a context manager.

    With `tls_ca` or a certificate the connection is TLS. Every method raises StillhouseError with a sentence that
    names a remedy; TEACHER_UNREACHABLE if nobody answers.
    """

    service = "teacher"

    def __init__(self, target: str = DEFAULT_TEACHER, **options: Any) -> None:
        super().__init__(target, **options)
        self.stub = TeacherServiceStub(self.channel)

    def info(self) -> teacher_pb2.GetTeacherInfoResponse:
        """The loaded model, its fingerprints, limits, capabilities and adapters."""
        return self.call(self.stub.GetTeacherInfo, teacher_pb2.GetTeacherInfoRequest())

    @cached_property
    def limits(self) -> teacher_pb2.GetTeacherInfoResponse:
        """info(), asked once."""
        return self.info()

    def refresh(self, *, timeout_s: float | None = None) -> teacher_pb2.GetTeacherInfoResponse:
        """info(), asked anew: after a teacher was lost it may be another."""
        request = teacher_pb2.GetTeacherInfoRequest()
        info: teacher_pb2.GetTeacherInfoResponse
        info = self.call(self.stub.GetTeacherInfo, request, timeout_s=timeout_s)
        self.__dict__["limits"] = info
        return info

    @property
    def was_reached(self) -> bool:
        """Whether it ever said who it is."""
        return "limits" in self.__dict__

    def tokenizer(self) -> dict[str, bytes]:
        """File name to content, of the tokenizer's files."""
        files: dict[str, bytearray] = {}
        name, size = "", 0
        request = teacher_pb2.GetTokenizerRequest()
        for piece in self.stream(self.stub.GetTokenizer, request):
            name = piece.file_name or name
            size += len(piece.data)
            if Path(name).name != name or not name or name.startswith(".") or size > MAX_TOKENIZER_BYTES:
                raise StillhouseError(
                    Reason.TOKENIZER_INVALID,
                    f"the teacher sent {name!a}, {size} bytes so far, as a part of its tokenizer; expected are plain file "
                    f"names and at most {MAX_TOKENIZER_BYTES} bytes.",
                )
            files.setdefault(name, bytearray()).extend(piece.data)
        return {name: bytes(content) for name, content in files.items()}

    def save_tokenizer(self, directory: Path | str) -> list[Path]:
        """The tokenizer's files, written into `directory`."""
        directory = Path(directory)
        paths = []
        for name, content in self.tokenizer().items():
            path = directory / name
            try:
                directory.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            except OSError as error:
                raise file_error("write", path, error) from error
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
    ) -> Iterator[Piece]:
        """Pieces of text as they are written; those of one sample in order, those of different samples mixed.

        A prompt is text, token ids, or messages with `role` and `content`, which the teacher's chat template renders.
        With `top_k_logprobs` each piece has the distributions of its tokens. What is None takes the contract's default:
        temperature 1, top_p 1, all tokens, 256 new tokens. At most `max_prompts` of the teacher are in flight.
        Closing the iterator aborts what is left.
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
        return pieces(self, (as_prompt(each, adapter) for each in prompts), request)

    def complete(self, prompts: Iterable[Prompt], **options: Any) -> Iterator[Completion]:
        """Whole samples, each as soon as it is finished; options as for generate()."""
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
        entropy: bool = False,
        float16: bool = False,
        pack_token_ids: bool = False,
        max_inflight: int = 0,
        on_lost: OnLost | None = None,
        patience_s: float = PATIENCE_S,
    ) -> Iterator[ScoreAnswer]:
        """For each sequence, in the order in which they are ready, its distributions or its own error.

        A sequence is a ScoreItem or a pair of id and token ids [T]. `sequences` is read in another thread, at most
        `max_inflight` ahead of the answers (0, or more than the teacher's limit, means that limit). A lost stream is
        opened again and unanswered sequences are sent again. Logprobs travel as float32 unless `float16`; with
        `pack_token_ids` ids travel in the fewest bits that hold the vocabulary.
        """
        config = teacher_pb2.DistributionConfig(
            top_k=top_k,
            logprob_dtype=Tensor.DATA_TYPE_FLOAT16 if float16 else Tensor.DATA_TYPE_FLOAT32,
            temperatures=temperatures,
            num_sampled_tokens=num_sampled_tokens,
            seed=seed,
            entropy=entropy,
            pack_token_ids=pack_token_ids,
        )
        return score(
            self, sequences, config, max_inflight=max_inflight, on_lost=on_lost, patience_s=patience_s
        )

    def load_adapter(self, name: str, path: str) -> teacher_pb2.Adapter:
        """Makes the LoRA adapter in the directory `path` on the teacher's host usable as `name`."""
        request = teacher_pb2.LoadAdapterRequest(adapter=name, path=path)
        return self.call(self.stub.LoadAdapter, request, timeout_s=LOAD_TIMEOUT_S).adapter

    def unload_adapter(self, name: str) -> None:
        """Frees the adapter `name`; the name stays bound to its weights."""
        request = teacher_pb2.UnloadAdapterRequest(adapter=name)
        self.call(self.stub.UnloadAdapter, request, timeout_s=LOAD_TIMEOUT_S)

    def upload_adapter(
        self, directory: Path | str, *, on_bytes: Callable[[int], None] | None = None
    ) -> teacher_pb2.UploadAdapterResponse:
        """Copies adapter_config.json and adapter_model.safetensors to the teacher's host, for load_adapter()."""
        for name in FILES:
            try:
                (Path(directory) / name).open("rb").close()
            except OSError as error:
                raise file_error("read", Path(directory) / name, error) from error
        requests = upload_requests(Path(directory), on_bytes or (lambda _: None))
        return self.call(self.stub.UploadAdapter, requests, timeout_s=LOAD_TIMEOUT_S)
