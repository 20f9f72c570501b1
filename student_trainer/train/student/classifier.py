"""A student that is a sequence classifier: an encoder with a head over named classes, whose head may begin as random numbers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor, nn

from stillhouse.protos.errors import StillhouseError, first_line
from stillhouse.protos.files.weight_names import listed
from stillhouse.protos.library_errors import reported_as
from stillhouse.student_trainer.config.schema import StudentConfig
from stillhouse.student_trainer.train.batching.collate import MicroBatch
from stillhouse.student_trainer.train.student.adapters import add_adapter, load_adapter
from stillhouse.student_trainer.train.student.loading import keep_layers, model_not_found, model_source
from stillhouse.student_trainer.train.student.pretrained import UnfitModelError
from stillhouse.student_trainer.train.student.student import Student, evaluation_mode, require_finite_weights

log = structlog.get_logger()

_SUFFIX = "ForSequenceClassification"


def own_class_names(config: StudentConfig, data_dir: Path) -> tuple[str, ...]:
    """Names of the classes of `config.model`, by class, if it is a sequence classifier already; else empty.

    Raises StillhouseError(MODEL_NOT_FOUND) for a model without a readable configuration, or whose classes overlap.
    """
    settings = _settings(config, data_dir)
    if config.from_config or not str((settings.architectures or [""])[0]).endswith(_SUFFIX):
        return ()
    if getattr(settings, "problem_type", None) in ("regression", "multi_label_classification"):
        raise model_not_found(
            config,
            config.model,
            f"has problem_type {settings.problem_type}, and classes must exclude each other",
        )
    return tuple(str(settings.id2label[each]) for each in range(settings.num_labels))


class Classifier(Student):
    """A sequence classifier, its trainable parameters and its tokenizer."""

    is_language_model = False

    def __init__(self, model: Any, tokenizer: Any, config: StudentConfig, data_dir: Path = Path()) -> None:
        super().__init__(model, tokenizer, config, data_dir)
        labels = self.plain.config.id2label
        self.class_names = tuple(str(labels[each]) for each in range(self.plain.config.num_labels))
        self._takes_types = "token_type_ids" in inspect.signature(self.plain.forward).parameters
        self.max_positions = _max_positions(self.plain, tokenizer)

    @classmethod
    def load_with_classes(
        cls,
        config: StudentConfig,
        tokenizer: Any,
        class_names: Sequence[str],
        *,
        data_dir: Path,
        device: torch.device,
        precision: str,
        seed: int,
    ) -> Classifier:
        """Loads the student on `device`, as `Student.load` does, with a head over `class_names`."""
        torch.manual_seed(seed)
        model = load_classifier(config, class_names, data_dir, cls.weight_dtype(config, precision), device)
        if model.config.pad_token_id is None:  # decoders with a head read the last token that is none
            model.config.pad_token_id = tokenizer.pad_token_id
        _try_pass(model, config)
        student = cls(model, tokenizer, config, data_dir)
        student.make_ready()
        return student

    @staticmethod
    def weight_dtype(config: StudentConfig, precision: str) -> torch.dtype:  # noqa: ARG004
        """Returns float32: beside an adapter the head is trained as a whole."""
        return torch.float32

    @property
    def end_ids(self) -> list[int]:
        """Empty: a classifier writes no text."""
        return []

    def add_end_ids(self, token_ids: Any) -> None:
        """Does nothing: a classifier writes no text."""

    def _compute(self, batch: MicroBatch, **options: Any) -> Any:
        arguments: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if self._takes_types and batch.token_type_ids is not None:
            arguments["token_type_ids"] = batch.token_type_ids
        return self.model(**arguments, **options)

    def _logits(self, output: Any, batch: MicroBatch) -> Tensor:  # noqa: ARG002 (of targets)
        """Returns the logits over classes of each row, in order, [1, B, C]."""
        logits_BC: Tensor = output.logits
        return logits_BC.unsqueeze(0)

    def load_again(self, config: StudentConfig, dtype: torch.dtype, device: torch.device) -> Any:
        """Loads another copy by `config`."""
        return load_classifier(config, self.class_names, self.data_dir, dtype, device)

    def load_saved(self, directory: Path) -> Any:
        """Loads the complete model that was saved to `directory`."""
        from transformers import AutoModelForSequenceClassification

        model, found = AutoModelForSequenceClassification.from_pretrained(
            str(directory), dtype="auto", use_safetensors=True, output_loading_info=True
        )
        if found["missing_keys"]:
            raise UnfitModelError(f"lacks {listed(found['missing_keys'])}")
        return model


@dataclass(frozen=True, kw_only=True, slots=True)
class _Head:
    """Modules of a classifier that its encoder's files do not hold."""

    modules: tuple[str, ...]
    """Trained as a whole, also beside an adapter."""
    is_new: bool


def load_classifier(
    config: StudentConfig,
    class_names: Sequence[str],
    data_dir: Path,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """Loads the encoder with the kept layers, a head over `class_names` and, if one is trained, the adapter, on `device`.

    Raises StillhouseError: MODEL_NOT_FOUND, INVALID_SPEC.
    """
    model, head = _load_base(config, class_names, data_dir, dtype)
    if head.is_new and not config.adapter:
        log.info("modules of the classifier begin as random numbers", modules=", ".join(head.modules))
    model = keep_layers(model, config)
    if config.adapter:
        model = load_adapter(model, config, data_dir)
    elif config.lora:
        model = add_adapter(model, config.lora, head=head.modules)
    return model.to(device)


def _load_base(
    config: StudentConfig, class_names: Sequence[str], data_dir: Path, dtype: torch.dtype
) -> tuple[Any, _Head]:
    from transformers import AutoModelForSequenceClassification

    settings = _settings(config, data_dir)
    is_classifier = str((settings.architectures or [""])[0]).endswith(_SUFFIX)
    settings.id2label = dict(enumerate(class_names))
    settings.label2id = {name: number for number, name in enumerate(class_names)}
    settings.problem_type = "single_label_classification"
    source = model_source(config, data_dir)
    try:
        if config.from_config:
            model = AutoModelForSequenceClassification.from_config(
                settings, dtype=dtype, trust_remote_code=False
            )
            missing: set[str] = {name for name, _ in model.named_parameters()}
        else:
            model, found = AutoModelForSequenceClassification.from_pretrained(
                source,
                config=settings,
                revision=config.revision or None,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
            missing = set(found["missing_keys"])
            _check_missing(model, missing, is_classifier=is_classifier)
    except torch.OutOfMemoryError:
        raise
    except UnfitModelError as error:
        raise model_not_found(config, source, str(error)) from error
    except Exception as error:  # loaders raise whatever their file formats raise
        problem = f"cannot be loaded as a sequence classifier from safetensors ({first_line(error)})"
        raise model_not_found(config, source, problem) from error
    own = [
        name
        for name, each in model.named_children()
        if name != model.base_model_prefix and _has_weights(each)
    ]
    poolers = {name.split(".pooler.")[0] + ".pooler" for name in missing if ".pooler." in name}
    return model, _Head(modules=(*own, *sorted(poolers)), is_new=bool(missing))


def _check_missing(model: Any, missing: set[str], *, is_classifier: bool) -> None:
    """Raises UnfitModelError for weights that would be random, and are not those of a new head or pooler."""
    prefix = f"{model.base_model_prefix}."
    lost = {name for name in missing if is_classifier or (name.startswith(prefix) and ".pooler." not in name)}
    if lost:
        raise UnfitModelError(
            f"lacks {len(lost)} weights of a {type(model).__name__} in its files ({listed(lost)}); they would be random numbers"
        )


def _settings(config: StudentConfig, data_dir: Path) -> Any:
    from transformers import AutoConfig

    source = model_source(config, data_dir)

    def refused(error: BaseException) -> StillhouseError:
        return model_not_found(config, source, f"has no configuration that can be read ({first_line(error)})")

    with reported_as(refused):
        return AutoConfig.from_pretrained(source, revision=config.revision or None, trust_remote_code=False)


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _max_positions(plain: Any, tokenizer: Any) -> int | None:
    """Longest supported sequence: positions of the model, less those that RoBERTa's kind keeps for padding."""
    limits = [int(tokenizer.model_max_length)]
    positions = getattr(plain.config, "max_position_embeddings", None)
    if positions:
        table = next(
            (each for name, each in plain.named_modules() if name.endswith("position_embeddings")), None
        )
        padding = getattr(table, "padding_idx", None)
        limits.append(int(positions) - (0 if padding is None else padding + 1))
    return min(limits)


def _try_pass(model: Any, config: StudentConfig) -> None:
    """Raises StillhouseError(MODEL_NOT_FOUND) for a model that loads and cannot compute."""

    def refused(error: BaseException) -> StillhouseError:
        return model_not_found(
            config, config.model, f"loads, but cannot classify two tokens ({first_line(error)})"
        )

    with reported_as(refused), evaluation_mode(model), torch.no_grad():
        device = model.get_input_embeddings().weight.device
        token_ids = torch.ones(1, 2, dtype=torch.int64, device=device)
        logits = model(input_ids=token_ids, attention_mask=torch.ones_like(token_ids)).logits
        if logits.shape != (1, model.config.num_labels):
            raise ValueError(f"its logits have shape {list(logits.shape)}")
        require_finite_weights(model)
        if logits.isnan().any():
            raise ValueError("its logits are NaN")
