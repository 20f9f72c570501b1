"""Reference engine of classifiers: a sequence and its classes. On a CPU a result is bitwise independent of other requests."""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn, Self

import torch
import transformers

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.stillhouse.v1.teacher_pb2 import CAPABILITY_LAYER_STATES
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engines.hf.base import ModelEngine, batch_tokens
from stillhouse.teacher_service.engines.hf.classifier import ClassifierModel
from stillhouse.teacher_service.engines.hf.classifying import (
    TextlessEngine,
    classifier_lacks,
    describe_classifier,
    finite_row,
    require_no_adapters,
)
from stillhouse.teacher_service.engines.hf.worker import SampleJob, ScoreJob
from stillhouse.teacher_service.models.files import ModelFiles, locate_model
from stillhouse.teacher_service.models.tokenizer import TextCodec


class HfClassifierEngine(TextlessEngine, ModelEngine):
    """Engine of a sequence classifier on transformers, without adapters."""

    def __init__(
        self, config: TeacherConfig, model: ClassifierModel, codec: TextCodec, files: ModelFiles
    ) -> None:
        self._model = model
        self.codec = codec
        info = describe_classifier(config, model, codec, files)
        self.info = replace(
            info,
            engine=f"hf transformers {transformers.__version__} classifier",
            batch_tokens=batch_tokens(config, model.device),
            capabilities=info.capabilities | ({CAPABILITY_LAYER_STATES} if model.num_layers else set()),
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
        )
        super().__init__(config, model.device)

    @classmethod
    def _load(cls, config: TeacherConfig) -> Self:
        torch.set_num_threads(config.num_threads)
        require_no_adapters(config)
        files = locate_model(config.model, config.revision)
        codec = TextCodec.load(config.model, config.revision)
        return cls(config, ClassifierModel.load(config, files.directory, codec.max_tokens), codec, files)

    def _compute_batch(self, batch: list[ScoreJob]) -> None:
        layers = sorted({each for job in batch for each in job.item.options.hidden_layers})
        logits_BC, states_BTDH = self._model.logits(
            [job.item.token_ids for job in batch], [job.item.token_type_ids for job in batch], layers
        )
        logprobs_BC = logits_BC.log_softmax(-1).cpu().numpy()
        for number, job in enumerate(batch):
            own = [layers.index(each) for each in job.item.options.hidden_layers]
            states = None
            if states_BTDH is not None and own:
                states = states_BTDH[number : number + 1, :, own].cpu().numpy()
            try:
                row = finite_row(logprobs_BC[number], len(job.item.token_ids))
                job.future.set_result(replace(row, layer_states=states))
            except StillhouseError as error:
                job.future.set_exception(error)

    def _generate_token(self, job: SampleJob) -> NoReturn:  # noqa: ARG002
        raise classifier_lacks("completions")
