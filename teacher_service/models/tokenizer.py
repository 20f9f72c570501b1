"""Tokenizer of the service: encodes text, renders conversations, and detokenizes streams."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stillhouse.protos.errors import Reason, StillhouseError, first_line
from stillhouse.protos.files.model_settings import GENERATION_SETTINGS, wrong_settings
from stillhouse.protos.library_errors import reported_as
from stillhouse.protos.rows.chat_template import ContentForm, select_template
from stillhouse.protos.rows.conversation import Turns
from stillhouse.protos.rows.field_error import FieldError
from stillhouse.protos.rows.template_fields import TemplateFields
from stillhouse.protos.tokenizers.bounded_rendering import (
    bounded_rendering,
    checked_length,
    checked_template,
)
from stillhouse.protos.tokenizers.bounded_templates import bound_library
from stillhouse.protos.tokenizers.fingerprint import tokenizer_fingerprint
from stillhouse.protos.tokenizers.prompt import encode_prompt, require_vocabulary
from stillhouse.teacher_service.models.files import locate_model

# Files that a trainer may fetch; nothing else of the model's directory leaves the host.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
_TELLS_DATE = "strftime_now"
"""The function by which templates ask for the date."""
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes: at most this many ids end in the middle of it.
_MAX_SPLIT_IDS = 3
_CONTEXT_IDS = 8


class TextCodec:
    """A model's tokenizer and chat template."""

    def __init__(self, tokenizer: Any, directory: Path, extra_eos_token_ids: Sequence[int] = ()) -> None:
        """`tokenizer` is a fast tokenizer of transformers, loaded from `directory`."""
        self._tokenizer = tokenizer
        self._directory = directory
        self.tokenizer_size: int = max(tokenizer.get_vocab().values()) + 1
        self.max_tokens: int = int(tokenizer.model_max_length)
        """Longest text by the tokenizer's own account; a huge number if it has none."""
        own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        self._special_ids = {
            str(token): token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys((*own, *extra_eos_token_ids)))
        self.tokenizer_fingerprint: str = tokenizer_fingerprint(
            tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map
        )
        template = tokenizer.chat_template
        self.chat_template_fingerprint: str = (
            hashlib.sha256(str(template).encode()).hexdigest() if template else ""
        )
        self._fields = TemplateFields(template, self._rendered)
        self._form = ContentForm(self._applied)

    @classmethod
    def load(cls, model: str, revision: str = "") -> TextCodec:
        """Loads the tokenizer of a directory or hub id; no code of the model is run.

        Raises `StillhouseError` (MODEL_NOT_FOUND) where no tokenizer can be loaded so.
        """
        from transformers import AutoTokenizer

        directory = locate_model(model, revision, weights=False).directory
        if problem := wrong_settings(directory / GENERATION_SETTINGS):
            raise StillhouseError(Reason.MODEL_NOT_FOUND, f"{model} {problem}.")

        def refused(error: BaseException) -> StillhouseError:
            return StillhouseError(
                Reason.MODEL_NOT_FOUND,
                f"The tokenizer of {model} cannot be loaded: {first_line(error).rstrip('.')}. "
                "Put a tokenizer without custom code beside the model.",
            )

        with reported_as(refused):
            tokenizer = AutoTokenizer.from_pretrained(
                directory, trust_remote_code=False, local_files_only=True
            )
            # A broken one may load and fail at its first text.
            tokenizer("a")
            require_vocabulary(tokenizer)
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise StillhouseError(
                Reason.MODEL_NOT_FOUND,
                f"{model} has no tokenizer.json and {type(tokenizer).__name__} cannot make one. "
                "Convert the tokenizer with transformers and save it beside the model.",
            )
        return cls(tokenizer, directory, eos_token_ids(directory))

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Encodes a prompt to INT32 [T], with the special tokens that the tokenizer puts before it, each once."""
        return np.asarray(encode_prompt(self._tokenizer, text).token_ids, dtype=np.int32)

    def encode_completion(self, text: str) -> npt.NDArray[np.int32]:
        """Encodes the text of a completion to INT32 [T], without special tokens before or behind it."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)

    def render(self, turns: Turns, *, today: date | None = None) -> npt.NDArray[np.int32]:
        """Renders a conversation to INT32 [T] with the model's chat template and generation prompt.

        A template that asks for the date is told `today`; without it, the day of this host.

        Raises `StillhouseError` (INVALID_REQUEST) if the model has no chat template, or its template refuses the
        conversation or leaves a field of it out.
        """
        if not self._tokenizer.chat_template:
            raise StillhouseError(
                Reason.INVALID_REQUEST,
                f"The model in {self._directory.name} has no chat template, so it takes no conversation. "
                "Send text or token ids, or serve a model with a template.",
            )
        try:
            if today is not None and _TELLS_DATE in select_template(
                self._tokenizer.chat_template, turns.tools
            ):
                turns = replace(turns, options={**turns.options, _TELLS_DATE: today.strftime})
            text = self._rendered(self._fields.resolve(turns), turns)
        except FieldError as error:
            raise StillhouseError(Reason.INVALID_REQUEST, f"{error}") from error
        except Exception as error:  # a template is the model author's program and may raise anything
            raise StillhouseError(
                Reason.INVALID_REQUEST,
                f"The model's chat template refuses this conversation of {len(turns.messages)} messages: {first_line(error).rstrip('.')}. "
                "Change the roles or their order.",
            ) from error
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)

    def _rendered(self, messages: Sequence[Mapping[str, Any]], turns: Turns) -> str:
        return self._applied(self._form.apply(messages), turns.tools, turns.options)

    def _applied(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
    ) -> str:
        from transformers.utils import chat_template_utils

        template = checked_template(select_template(self._tokenizer.chat_template, tools))
        bound_library(chat_template_utils)
        with bounded_rendering():
            text = self._tokenizer.apply_chat_template(
                list(messages),
                tools=[dict(tool) for tool in tools] or None,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
                **(options or {}),
            )
        return checked_length(str(text))

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Yields name and content of every tokenizer file; always includes tokenizer.json.

        tokenizer.json is serialised from the loaded tokenizer, which serves: transformers may change parts of the
        file, by the type of the model beside it.
        """
        for name in TOKENIZER_FILES:
            path = self._directory / name
            if name == "tokenizer.json":
                yield name, self._tokenizer.backend_tokenizer.to_str().encode()
            elif path.is_file():
                yield name, path.read_bytes()

    def stream_decoder(self, stop: Sequence[str] = (), context: Sequence[int] = ()) -> StreamDecoder:
        """Creates the decoder of one sample; `context` is the end of its prompt, which decides on a leading space."""
        return StreamDecoder(
            self._tokenizer,
            [each for each in stop if each not in self._special_ids],
            context,
            # An end token ends a sample by itself, and belongs to it.
            stop_ids={self._special_ids[each] for each in stop if each in self._special_ids}
            - set(self.eos_token_ids),
        )

    def check_stop(self, stop: Iterable[str]) -> None:
        """Raises `StillhouseError` (INVALID_REQUEST) for stop strings in which special tokens stand beside text."""
        for each in stop:
            inside = next((token for token in self._special_ids if token in each and token != each), None)
            if inside is not None and each not in self._special_ids:
                raise StillhouseError(
                    Reason.INVALID_REQUEST,
                    f"The stop string {each!r} would never match: it contains {inside!r}, a special token, which has no text in a "
                    "sample. Give the special token alone; it ends a sample by its id.",
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """Result of one push: text and ids that can no longer change."""

    text: str
    """The new text; excludes a stop string and any beginning of one."""
    matched_stop: bool
    """A stop string was found. The sample ends before it, and later pushes are an error."""
    num_ids_kept: int
    """Number of ids since the first push that belong to the sample for certain: those whose text begins before the
    stop string. Never falls; without stop strings it is the number of ids pushed."""


class StreamDecoder:
    """Detokenizes one sample incrementally; special tokens have no text."""

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str],
        context: Sequence[int] = (),
        *,
        stop_ids: Collection[int] = (),
    ) -> None:
        """`stop` holds no empty string; `stop_ids` end the sample as a stop string does."""
        assert all(stop), "an empty stop string ends every text"
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._stop_ids = frozenset(stop_ids)
        self._reads_one_by_one = bool(stop or stop_ids)
        self._read = [int(token) for token in context[-_CONTEXT_IDS:]]  # context for decoding the next
        self._unread: list[int] = []  # incomplete: they end in the middle of a character
        # A prompt may end so too; its character then belongs to the sample.
        self._read_text = self._decode(self._read).rstrip(_REPLACEMENT)
        self._pending = ""  # withheld text: it may be the beginning of a stop string
        self._num_given = 0  # characters emitted
        self._spans: list[tuple[int, int]] = []  # begin and end of the text of every id read
        self._num_kept = 0
        self._done = False

    def push(self, token_ids: npt.NDArray[np.int32] | Sequence[int], final: bool = False) -> Decoded:
        """Decodes the next ids; `final` marks the last call, which emits all withheld text."""
        assert not self._done, "the sample has ended"
        self._done = final
        ids = [int(token) for token in token_ids]
        # With stop strings ids are read one by one, since the text of each decides whether it is kept.
        parts = [[token] for token in ids] if self._reads_one_by_one else [ids]
        for index, part in enumerate(parts or [[]]):
            if self._stop_ids.intersection(part):
                return self._end_before_stop_id()
            self._take(part, final=final and index >= len(parts) - 1)
            if (start := self._find_stop()) is not None:
                return self._end_at(start)
        text = self._give(len(self._pending) - (0 if final else self._num_held()))
        if not self._reads_one_by_one:
            self._num_kept += len(ids)
        while self._num_kept < len(self._spans) and self._spans[self._num_kept][1] <= self._num_given:
            self._num_kept += 1
        return Decoded(text=text, matched_stop=False, num_ids_kept=self._num_kept)

    def _take(self, ids: Sequence[int], *, final: bool) -> None:
        """Appends the text of `ids` to the pending text, except for ids that end in the middle of a character."""
        self._unread.extend(ids)
        whole = self._decode(self._read + self._unread)
        num_read = len(self._unread)
        if whole.endswith(_REPLACEMENT) and not final:
            for num_read in range(len(self._unread) - 1, len(self._unread) - 1 - _MAX_SPLIT_IDS, -1):
                if num_read <= 0:
                    return
                whole = self._decode(self._read + self._unread[:num_read])
                if not whole.endswith(_REPLACEMENT):
                    break
            else:  # bytes that will never be a character
                num_read = len(self._unread)
                whole = self._decode(self._read + self._unread)
        begin = self._num_given + len(self._pending)
        self._pending += whole[len(self._read_text) :]
        if self._reads_one_by_one:
            end = self._num_given + len(self._pending)
            self._spans.extend([(begin, end)] * num_read)
        self._read = [*self._read, *self._unread[:num_read]][-_CONTEXT_IDS:]
        self._unread = self._unread[num_read:]
        self._read_text = self._decode(self._read)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _find_stop(self) -> int | None:
        found = [start for stop in self._stop if (start := self._pending.find(stop)) >= 0]
        return min(found, default=None)

    def _num_held(self) -> int:
        """Length of the longest end of the pending text that begins a stop string."""
        longest = min(max(map(len, self._stop), default=1) - 1, len(self._pending))
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._pending[-length:]) for stop in self._stop):
                return length
        return 0

    def _end_at(self, start: int) -> Decoded:
        self._done = True
        end = self._num_given + start
        num_before = sum(1 for begin, _ in self._spans if begin < end)
        return Decoded(
            text=self._give(start), matched_stop=True, num_ids_kept=max(self._num_kept, num_before)
        )

    def _end_before_stop_id(self) -> Decoded:
        self._take([], final=True)
        if (start := self._find_stop()) is not None:
            return self._end_at(start)
        self._done = True
        return Decoded(text=self._give(len(self._pending)), matched_stop=True, num_ids_kept=len(self._spans))

    def _give(self, length: int) -> str:
        text, self._pending = self._pending[:length], self._pending[length:]
        self._num_given += length
        return text


def eos_token_ids(directory: Path) -> tuple[int, ...]:
    """Lists the end-of-sequence ids of generation_config.json and config.json, in that order."""
    from transformers import AutoConfig, GenerationConfig

    found: dict[int, None] = {}
    for load in (GenerationConfig.from_pretrained, AutoConfig.from_pretrained):
        try:
            settings = load(directory, local_files_only=True, trust_remote_code=False)
            value = getattr(settings, "eos_token_id", None)
        except Exception:  # noqa: S112 - both are optional, and loaders raise anything; the tokenizer names its own
            continue
        for token in value if isinstance(value, list | tuple) else [value]:
            if isinstance(token, int) and token >= 0:
                found[token] = None
    return tuple(found)
