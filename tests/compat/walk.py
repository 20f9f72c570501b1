"""The stages that an architecture goes through, each compared with transformers in float32.

A stage is refused by name, which is a result, or it gives the right numbers; all else fails the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from stillhouse.protos.errors import Reason, StillhouseError, from_json, from_status
from stillhouse.student_trainer.config.schema import RolloutConfig, StudentConfig
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.train.rollouts.local_sampler import LocalSampler
from stillhouse.student_trainer.train.student.student import Student
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engine import DistributionOptions, GeneratedChunk, GenerateInput, ScoreInput
from stillhouse.teacher_service.engines.hf.engine import HfEngine
from stillhouse.teacher_service.engines.hf.model import HfModel
from tests.compat.corpus import VOCAB_SIZE, Corpus, load, logprobs, mean_cross_entropy, token_ids, trained
from tests.conftest import Models
from tests.student_trainer.train.runs import events, final_weights, finish_here, make_run, metric, spec_of
from tests.teacher_service.calls import assert_agrees
from tests.teacher_service.local import serving

STAGES = ("load", "score", "generate", "train", "resume", "rollout", "export", "reload", "adapter")
STEPS, RATE = 2, 0.02
PROMPT_TOKENS, NEW_TOKENS = (9, 5), 6
TOLERANCE = 1e-3
"""Largest difference of log-probabilities after training, in nats."""
Result = TypeVar("Result")


@dataclass(kw_only=True, slots=True)
class Walk:
    """One architecture on its way; `results` says what became of each stage."""

    model: Path
    folder: Path
    corpus: Corpus
    models: Models
    results: dict[str, str] = field(default_factory=dict)
    train_ids: list[list[int]] = field(init=False)
    held_out_ids: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.train_ids = token_ids(self.corpus.train, self.model)
        self.held_out_ids = token_ids(self.corpus.held_out, self.model)

    def all_stages(self) -> None:
        """Takes every stage. Raises AssertionError at wrong numbers."""
        with contextlib.ExitStack() as stack:
            teacher = self._take(
                "load", lambda: stack.enter_context(_served(self.model, self.models, self.folder))
            )
            if teacher is None:
                return
            self._take("score", lambda: self._score(teacher))
            self._take("generate", lambda: self._generate(teacher))
            run_dir = self._take("train", lambda: self._train("run", teacher.target))
            if run_dir is None:
                return
            self._take("resume", lambda: self._resume(run_dir, teacher.target))
            self._take("adapter", lambda: self._adapt(teacher.target))
        self._take("rollout", self._roll_out)
        self._take("export", lambda: self._export(run_dir))
        self._take("reload", lambda: self._reload(run_dir))

    def _take(self, stage: str, action: Callable[[], Result]) -> Result | None:
        """Returns what the stage gives; None if it is refused by name."""
        self.results[stage] = "WRONG"
        try:
            result = action()
        except StillhouseError as error:
            if error.reason is Reason.INTERNAL or "\n" in error.message:
                raise
            self.results[stage] = str(error.reason)
            return None
        self.results[stage] = "ok"
        return result

    def _score(self, teacher: Teacher) -> None:
        model = load(self.model)
        with torch.no_grad():
            for ids in self.train_ids:
                item = ScoreInput(
                    token_ids=np.array(ids, np.int32), start=1, options=DistributionOptions(top_k=VOCAB_SIZE)
                )
                answer = teacher.call(teacher.engine.score(item))
                assert_agrees(answer, ids, logprobs(model, ids).double().numpy(), top_k=VOCAB_SIZE)

    def _generate(self, teacher: Teacher) -> None:
        """Two samples take turns, and each says what a whole pass over its text says."""
        model = load(self.model)
        prompts = [self.train_ids[0][:size] for size in PROMPT_TOKENS]
        samples = teacher.call(teacher.write(prompts))
        with torch.no_grad():
            for prompt, chunks in zip(prompts, samples, strict=True):
                ids = list(prompt)
                for chunk in chunks:
                    wanted = logprobs(model, ids)[-1].double().numpy()
                    assert chunk.distributions is not None
                    ids += chunk.token_ids.tolist()
                    token_ids, own = chunk.distributions.token_ids[0], chunk.distributions.logprobs[0]
                    assert np.abs(wanted[token_ids] - own).max() < 1e-4
                    assert wanted[ids[-1]] > wanted.max() - 1e-4, "greedy"
                assert len(ids) > len(prompt)

    def _spec(self, target: str, **further: Any) -> dict[str, Any]:
        return spec_of(
            self.model,
            self.corpus.train,
            target,
            **{
                "data": {
                    "eval": [{"path": str(self.corpus.held_out)}],
                    "eval_fraction": 0,
                    "max_sequence_tokens": 64,
                    "end_text": False,
                },
                "loss": {"hard_weight": 1, "top_k": VOCAB_SIZE, "sparse_target": "tail_bucket"},
                "optimizer": {
                    **{"name": "sgd", "learning_rate": RATE, "lr_scheduler": "constant", "weight_decay": 0},
                    **{"warmup_fraction": 0, "max_grad_norm": 0, "max_steps": STEPS, "epochs": STEPS},
                    "batch_size": len(self.train_ids),
                },
                "evaluation": {"top_k": VOCAB_SIZE},
                "checkpoint": {"every_steps": 1, "keep": STEPS},
                "retry": {"teacher_wait_s": 5},
                **further,
            },
        )

    def _train(self, name: str, target: str, **further: Any) -> RunDir:
        """A whole run; its losses and held-out metrics are those of the same steps in transformers alone."""
        run_dir = _finished(make_run(self.folder, name, self._spec(target, **further)))
        before = load(self.model)
        started = _near(mean_cross_entropy(before, self.held_out_ids))
        assert metric(run_dir, "eval/cross_entropy")[0] == started
        assert metric(run_dir, "eval/kl")[0] == pytest.approx(0, abs=1e-5)
        assert metric(run_dir, "train/cross_entropy")[1] == _near(mean_cross_entropy(before, self.train_ids))
        assert metric(run_dir, "train/forward_kl")[1] == pytest.approx(0, abs=1e-5)
        if not further:
            after = trained(before, self.train_ids, steps=STEPS, rate=RATE)
            ended = mean_cross_entropy(after, self.held_out_ids)
            assert metric(run_dir, "eval/cross_entropy")[STEPS] == _near(ended)
            assert ended != started, "the steps changed something"
        return run_dir

    def _resume(self, whole: RunDir, target: str) -> None:
        """The checkpoint of the first step leads to the same weights, bit for bit."""
        resumed = make_run(self.folder, "resumed", self._spec(target))
        resumed.checkpoints_path.mkdir(parents=True, exist_ok=True)
        whole.checkpoint_path(1).rename(resumed.checkpoint_path(1))
        _finished(resumed)
        assert events(resumed, "started")[0]["step"] == 1
        weights, others = final_weights(whole), final_weights(resumed)
        assert weights.keys() == others.keys()
        for name, weight in weights.items():
            np.testing.assert_array_equal(weight, others[name], err_msg=name)

    def _adapt(self, target: str) -> None:
        """A LoRA adapter on all linear layers, merged: the exported model has the trained one's cross-entropy."""
        student = {"lora": {"rank": 2}, "output": "both"}
        run_dir = self._train("adapter", target, student={"model": str(self.model), **student})
        ended = mean_cross_entropy(load(run_dir.final_path), self.held_out_ids)
        assert metric(run_dir, "eval/cross_entropy")[STEPS] == _near(ended)

    def _roll_out(self) -> None:
        """The student's own samples have the log-probabilities of whole passes, whatever else is in the batch."""
        student = Student.load(
            StudentConfig(model=str(self.model)),
            self.corpus.tokenizer,
            data_dir=self.folder,
            device=torch.device("cpu"),
            precision="fp32",
            seed=0,
        )
        sampler = LocalSampler(
            student,
            device=torch.device("cpu"),
            autocast=contextlib.nullcontext,
            vocab_size=VOCAB_SIZE,
            num_likeliest=1,
        )
        prompts = [np.array(self.train_ids[0][:size], np.int32) for size in PROMPT_TOKENS]
        generation = RolloutConfig(max_new_tokens=NEW_TOKENS, samples_per_prompt=1)
        texts = sampler.write(prompts, generation, max_sequence_tokens=64, seeds=[1, 2])
        model = load(self.model)
        with torch.no_grad():
            for prompt, (text,) in zip(prompts, texts, strict=True):
                ids = [*prompt.tolist(), *text.token_ids.tolist()]
                wanted = logprobs(model, ids)[len(prompt) - 1 : -1]
                found = wanted.gather(-1, torch.tensor(text.token_ids.astype(np.int64))[:, None])[:, 0]
                assert np.abs(found.numpy() - text.logprobs).max() < 1e-4

    def _export(self, run_dir: RunDir) -> None:
        """The exported model computes what two steps of transformers alone have made."""
        exported = load(run_dir.final_path)
        wanted = trained(load(self.model), self.train_ids, steps=STEPS, rate=RATE)
        with torch.no_grad():
            for ids in self.held_out_ids:
                assert (logprobs(exported, ids) - logprobs(wanted, ids)).abs().max() < TOLERANCE
        ended = mean_cross_entropy(exported, self.held_out_ids)
        assert metric(run_dir, "eval/cross_entropy")[STEPS] == _near(ended)

    def _reload(self, run_dir: RunDir) -> None:
        """The exported model is served, and trained on, as the trained one."""
        final = run_dir.final_path
        served = HfModel.load(TeacherConfig(model=str(final), engine="hf", dtype="float32"), final)
        exported = load(final)
        ids = self.held_out_ids[0]
        with torch.no_grad():
            wanted = logprobs(exported, ids)
            rows = served.last_rows([np.array(ids, np.int32)], len(ids))[0]
            assert (served.head(rows).log_softmax(-1) - wanted).abs().max() < 1e-4
            student = Student.load(
                StudentConfig(model=str(final)),
                self.corpus.tokenizer,
                data_dir=self.folder,
                device=torch.device("cpu"),
                precision="fp32",
                seed=0,
            )
            student.model.eval()
            assert (logprobs(student.model, ids) - wanted).abs().max() < 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """A teacher that is served in a thread of this process."""

    engine: HfEngine
    target: str
    loop: asyncio.AbstractEventLoop

    def call(self, action: Coroutine[Any, Any, Result]) -> Result:
        """Result of the engine's coroutine."""
        return asyncio.run_coroutine_threadsafe(action, self.loop).result(60)

    async def write(self, prompts: list[list[int]]) -> list[list[GeneratedChunk]]:
        """Greedy samples of all prompts at once, with their distributions."""
        return list(await asyncio.gather(*(self._write_one(prompt) for prompt in prompts)))

    async def _write_one(self, prompt: list[int]) -> list[GeneratedChunk]:
        item = GenerateInput(
            token_ids=np.array(prompt, np.int32),
            temperature=0,
            max_new_tokens=NEW_TOKENS,
            options=DistributionOptions(top_k=VOCAB_SIZE),
        )
        return [chunk async for chunk in self.engine.generate(item)]


@contextmanager
def _served(model: Path, models: Models, folder: Path) -> Iterator[Teacher]:
    """A teacher with this model, for the block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="teacher", daemon=True)
    thread.start()
    context = serving(
        replace(models, teacher=model), folder, engine="hf", dtype="float32", max_inflight_sequences=16
    )

    def call(action: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(action, loop).result(60)

    try:
        local = call(context.__aenter__())
        try:
            yield Teacher(engine=local.engine, target=local.target, loop=loop)
        finally:
            call(context.__aexit__(None, None, None))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _finished(run_dir: RunDir) -> RunDir:
    """The run after its attempt. Raises the StillhouseError with which it failed."""
    finish_here(run_dir)
    last = events(run_dir)[-1]
    if last["kind"] == "failed":
        raise from_status(from_json(last["error"]))
    assert last["kind"] == "completed"
    return run_dir


def _near(value: float) -> Any:
    return pytest.approx(value, rel=1e-4)
