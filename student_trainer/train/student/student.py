"""The student: a causal language model, its trainable parameters and its tokenizer; computes only the logits that a loss needs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor, nn

from stillhouse.protos.errors import Reason, StillhouseError, first_line
from stillhouse.protos.library_errors import reported_as
from stillhouse.protos.rows.named_templates import template_source
from stillhouse.protos.tokenizers.prompt import require_vocabulary
from stillhouse.student_trainer.config.schema import StudentConfig
from stillhouse.student_trainer.train.batching.collate import MicroBatch
from stillhouse.student_trainer.train.student.loading import load_model, model_not_found, model_source
from stillhouse.student_trainer.train.student.pretrained import (
    UnfitModelError,
    check_causal,
    load_pretrained,
)
from stillhouse.student_trainer.train.student.saving import save_adapter, save_model

log = structlog.get_logger()


def load_tokenizer(config: StudentConfig, data_dir: Path, *, chat_template: str = "") -> Any:
    """Loads the student's tokenizer, with another chat template if one is given.

    Raises StillhouseError: MODEL_NOT_FOUND, or INVALID_SPEC for a template by a name that none has.
    """
    from transformers import AutoTokenizer

    source = model_source(config, data_dir)

    def refused(error: BaseException) -> StillhouseError:
        unread = _unread_configuration(config, source)
        if unread is not None:  # tokenizers read it too
            return model_not_found(
                config, source, f"has a config.json that cannot be read ({first_line(unread)})"
            )
        return model_not_found(config, source, f"has no tokenizer that can be read ({first_line(error)})")

    with reported_as(refused):
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=config.revision or None, trust_remote_code=False
        )
        # A broken one may load and fail at its first text.
        tokenizer("a")
        require_vocabulary(tokenizer)
    if chat_template:
        try:
            tokenizer.chat_template = template_source(tokenizer.chat_template, chat_template)
        except ValueError as error:
            raise StillhouseError(Reason.INVALID_SPEC, str(error)) from error
    return tokenizer


def _unread_configuration(config: StudentConfig, source: str) -> BaseException | None:
    """Returns the error of reading the model's configuration, if there is one."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(source, revision=config.revision or None, trust_remote_code=False)
    except Exception as error:  # of any type: they are those of classes of configurations
        return error
    return None


def configured_end_ids(config: StudentConfig, tokenizer: Any, data_dir: Path) -> list[int]:
    """Reads the tokens that end a text of the student before training: the tokenizer's, and those of its generation settings."""
    from transformers import AutoConfig, GenerationConfig

    source = model_source(config, data_dir)
    found = [tokenizer.eos_token_id]
    for load in (GenerationConfig.from_pretrained, AutoConfig.from_pretrained):
        try:
            settings = load(source, revision=config.revision or None, trust_remote_code=False)
            named = getattr(settings, "eos_token_id", None)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # none, or broken ones, which loading the model reports; the configuration has ends too
        found += named if isinstance(named, list | tuple) else [named]
        break
    return list(dict.fromkeys(int(each) for each in found if each is not None))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switches dropout and the like off inside the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class Student:
    """A causal language model, its trainable parameters and its tokenizer."""

    is_language_model = True
    """False for a classifier (classifier.py)."""
    class_names: tuple[str, ...] = ()
    """Names of a classifier's classes, by class."""

    def __init__(self, model: Any, tokenizer: Any, config: StudentConfig, data_dir: Path = Path()) -> None:
        self.model: nn.Module = model
        self.data_dir = data_dir
        """Root of names such as "runs/..."."""
        self.tokenizer = tokenizer
        self.config = config
        plain = model.get_base_model() if config.trains_adapter else model
        self.plain: Any = plain
        """The model without the adapter's wrapper."""
        self._keeps_logits = "logits_to_keep" in inspect.signature(plain.forward).parameters
        self.max_positions: int | None = getattr(plain.config, "max_position_embeddings", None)
        """Longest supported sequence, in tokens; None if the model does not say."""
        self.projections = nn.ParameterDict()
        """Matrices that take hidden states to a teacher's width, trained beside the model and no part of it."""

    @classmethod
    def load(
        cls,
        config: StudentConfig,
        tokenizer: Any,
        *,
        data_dir: Path,
        device: torch.device,
        precision: str,
        seed: int,
    ) -> Student:
        """Loads the student on `device`. Random weights, if any, come from `seed`.

        Trained weights are float32, also with bf16 autocast: an update of 1e-5 vanishes in bfloat16. A frozen base is
        bfloat16 with bf16. Raises StillhouseError: MODEL_NOT_FOUND, INVALID_SPEC, TOKENIZER_INVALID.
        """
        torch.manual_seed(seed)
        model = load_model(config, data_dir, cls.weight_dtype(config, precision), device)
        num_embeddings = model.get_input_embeddings().weight.shape[0]
        if num_embeddings < len(tokenizer):
            raise StillhouseError(
                Reason.TOKENIZER_INVALID,
                f"student.model {config.model} has {num_embeddings} embeddings, but its tokenizer has {len(tokenizer)} "
                "tokens. Resize the embeddings, or use the model's own tokenizer.",
            )
        _try_pass(model, config)
        student = cls(model, tokenizer, config, data_dir)
        student.make_ready()
        return student

    @staticmethod
    def weight_dtype(config: StudentConfig, precision: str) -> torch.dtype:
        """Returns the type of the loaded weights, as `load` says."""
        frozen_in_half = config.trains_adapter and precision == "bf16"
        return torch.bfloat16 if frozen_in_half else torch.float32

    def make_ready(self) -> None:
        """Switches to training, and logs the size."""
        model: Any = self.model
        if self.config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        trained = sum(each.numel() for each in self.trainable_parameters().values())
        total = sum(each.numel() for each in model.parameters())
        log.info("student loaded", model=self.config.model, trained=trained, of=total)

    def load_again(self, config: StudentConfig, dtype: torch.dtype, device: torch.device) -> Any:
        """Loads another copy by `config`. Raises StillhouseError as `load_model` does."""
        return load_model(config, self.data_dir, dtype, device)

    def load_saved(self, directory: Path) -> Any:
        """Loads the complete model that was saved to `directory`. Raises UnfitModelError."""
        return load_pretrained(str(directory), dtype="auto")

    @property
    def end_ids(self) -> list[int]:
        """Ids that end a text: those of the model's generation settings, and the tokenizer's end token."""
        named = getattr(self.plain.generation_config, "eos_token_id", None)
        ids = [*(named if isinstance(named, list | tuple) else [named]), self.tokenizer.eos_token_id]
        return list(dict.fromkeys(int(each) for each in ids if each is not None))

    def add_end_ids(self, token_ids: Iterable[int]) -> None:
        """Lets these tokens end a text too, in rollouts and in the generation settings that are exported."""
        settings = self.plain.generation_config
        if settings is None:
            return
        named = settings.eos_token_id
        # The tokenizer's end token may not be among them: an engine that serves the export reads these alone.
        known = [each for each in (named if isinstance(named, list | tuple) else [named]) if each is not None]
        added = [each for each in token_ids if each not in known]
        if added:
            ids = [*known, *added]
            settings.eos_token_id = ids if len(ids) > 1 else ids[0]
            names = self.tokenizer.convert_ids_to_tokens(added)
            log.info("tokens that end turns in the data end the student's texts too", tokens=names)
            if self.config.trains_adapter and self.config.output == "adapter":
                log.warning(
                    "the adapter's base does not end texts with them: name them where it is served",
                    tokens=names,
                )

    def trainable_parameters(self) -> Mapping[str, nn.Parameter]:
        """Returns the trainable parameters by name, those of projections too; shared ones once."""
        named = {name: each for name, each in self.model.named_parameters() if each.requires_grad}
        return named | {f"projections.{name}": each for name, each in self.projections.named_parameters()}

    def save(self, directory: Path, place: Path) -> None:
        """Writes the student as it is in Hugging Face layout: the complete model or the adapter, and the tokenizer.

        `place` is where `directory` will be once it is complete.
        """
        if self.config.trains_adapter:
            save_adapter(self.model, self.config, directory, self.tokenizer, place)
        else:
            save_model(self.model, directory)
        self.tokenizer.save_pretrained(directory)

    def logits(self, batch: MicroBatch) -> Tensor:
        """Returns the logits of each target of `batch`, in order, [1, N, V]."""
        return self._logits(self._compute(batch), batch)

    def logits_and_states(self, batch: MicroBatch) -> tuple[Tensor, Sequence[Tensor]]:
        """Returns the logits, and the hidden states before the first layer and after each, [B, L, H]."""
        output = self._compute(batch, output_hidden_states=True)
        return self._logits(output, batch), output.hidden_states or ()

    def _compute(self, batch: MicroBatch, **options: Any) -> Any:
        arguments: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        if batch.attention_mask is not None:
            arguments["attention_mask"] = batch.attention_mask
        if batch.position_ids is not None:
            arguments["position_ids"] = batch.position_ids
        if self._keeps_logits:
            arguments["logits_to_keep"] = batch.columns
        return self.model(**arguments, **options)

    def _logits(self, output: Any, batch: MicroBatch) -> Tensor:
        logits_BCV = output.logits
        if not self._keeps_logits:
            logits_BCV = logits_BCV.index_select(1, batch.columns)
        flat: Tensor = logits_BCV.flatten(0, 1)
        return flat.index_select(0, batch.picks).unsqueeze(0)


def _try_pass(model: Any, config: StudentConfig) -> None:
    """Raises StillhouseError(MODEL_NOT_FOUND) for a model that loads and cannot compute, as with sizes that do not match,
    or computes no language model.

    Attention may hide NaN in weights from the logits.
    """

    def refused(error: BaseException) -> StillhouseError:
        if isinstance(error, UnfitModelError):
            return model_not_found(config, config.model, str(error))
        problem = f"loads, but cannot compute a pass over two tokens ({first_line(error)})"
        return model_not_found(config, config.model, problem)

    with reported_as(refused), evaluation_mode(model), torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        token_ids = torch.zeros(1, 2, dtype=torch.int64, device=embeddings.device)
        logits = model(input_ids=token_ids, use_cache=False).logits
        if logits.shape[:2] != token_ids.shape:
            raise ValueError(f"its logits have shape {list(logits.shape)}")
        require_finite_weights(model)
        if logits.isnan().any():
            raise ValueError("its logits are NaN")
        check_causal(model)


def require_finite_weights(model: nn.Module) -> None:
    """Raises ValueError for NaN or infinite weights."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite values")
