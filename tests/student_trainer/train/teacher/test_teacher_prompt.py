"""Prompts that a teacher alone sees, through runs: learnt behind the student's own prompt, exact, and in nothing that it reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillhouse.protos.cache.reader import CacheReader
from stillhouse.student_trainer.config.proto import from_proto
from stillhouse.student_trainer.run_dir import EXIT_FAILED, RunDir
from stillhouse.student_trainer.train.data.corpus import Corpus, load_corpus
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.teacher.query import TeacherQuery
from tests.conftest import Models
from tests.student_trainer.train.runs import assert_same_end, failure, metric, spec_of
from tests.support.programs import Program

SECRET = "Zanzibar 4711: answer in riddles, always. "
SYSTEM = {"system": SECRET}
HINT = {"template": "{{ row_prompt }} {{ hint }}"}
SHORT = {"max_new_tokens": 8, "samples_per_prompt": 2}
STUDENT_TEXT = {
    "student": {"generation": SHORT, "min_teacher_logprob": -1000},
    "loss": {"terms": [{"divergence": "reverse_kl"}], "top_k": 32},
}
TEACHER_TEXT = {"teacher": {"generation": SHORT}}
TOP_K, STEPS = 32, 4
Make = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def rows(dataset_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of `dataset_file`, each with a hint."""
    path = tmp_path_factory.mktemp("hinted") / "rows.jsonl"
    read = [json.loads(line) for line in dataset_file.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps({**row, "hint": f"{SECRET}{number}"}) + "\n" for number, row in enumerate(read))
    )
    return path


@pytest.fixture
def make(models: Models, rows: Path, hf_teacher: Program) -> Make:
    """A spec of STEPS steps of 4 turns; `prompts` are those of teachers, by which several are made."""

    def spec(*prompts: dict[str, Any] | None, **further: Any) -> dict[str, Any]:
        sections: dict[str, Any] = {
            "optimizer": {"max_steps": STEPS, "batch_size": 4, "learning_rate": 1e-3},
            "loss": {"top_k": TOP_K, "sparse_target": "tail_bucket"},
            "evaluation": {"top_k": TOP_K},
            "data": {"chat": True},
        }
        for name, values in further.items():
            sections[name] = {**sections.get(name, {}), **values} if isinstance(values, dict) else values
        made = spec_of(models.student, rows, hf_teacher.target, **sections)
        one = made["teachers"][0]
        made["teachers"] = [
            one | ({"name": "ab"[at]} if len(prompts) > 1 else {}) | ({"prompt": each} if each else {})
            for at, each in enumerate(prompts)
        ]
        return made

    return spec


def corpus_of(run_dir: RunDir, data_dir: Path) -> tuple[Corpus, Any]:
    """The rows of a run as it reads them, and the tokenizer."""
    config = from_proto(run_dir.effective_spec())
    tokenizer = AutoTokenizer.from_pretrained(config.student.model)
    names = [each.name for each in config.teachers]
    corpus = load_corpus(config.data, config.evaluation, tokenizer, data_dir, names, prompted=config.teachers)
    return corpus, tokenizer


def local_kl(teacher: Path, student: Path, examples: Sequence[Example]) -> float:
    """KL of the teacher behind its prompt to the student behind its own, on top-k and tail, in float64."""
    models = [
        AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32).eval() for each in (teacher, student)
    ]
    total, number = 0.0, 0
    for example in examples:
        query = TeacherQuery.from_example(example).behind_prompt("")
        pairs = ((models[0], query.token_ids, query.start), (models[1], example.token_ids, example.start))
        with torch.no_grad():
            theirs, ours = (
                model(torch.from_numpy(ids.astype(np.int64))[None])
                .logits[0, start - 1 : -1]
                .double()
                .log_softmax(-1)
                for model, ids, start in pairs
            )
        at = example.mask[example.start :]
        theirs, ours = theirs[at], ours[at]
        kept = theirs.topk(TOP_K).indices
        is_shared = kept < ours.shape[-1]
        top = theirs.gather(-1, kept)
        own = ours.gather(-1, kept.clamp(max=ours.shape[-1] - 1))
        tail = 1 - (top.exp() * is_shared).sum(-1)
        own_tail = 1 - (own.exp() * is_shared).sum(-1)
        kl = (top.exp() * (top - own) * is_shared).sum(-1) + tail * (tail.log() - own_tail.log())
        total, number = total + float(kl.sum()), number + len(kl)
    return total / number


def assert_not_read(run_dir: RunDir, data_dir: Path) -> None:
    """No id of the secret is in a row of the student or in what a checkpoint holds of its texts."""
    corpus, tokenizer = corpus_of(run_dir, data_dir)
    for example in (*corpus.train, *corpus.eval):
        assert "Zanzibar" not in tokenizer.decode(example.token_ids)
        assert any(
            "Zanzibar" in tokenizer.decode(each.token_ids) for each in example.teacher_prompts.values()
        )
    for file in run_dir.path.rglob("checkpoints/*/*"):
        if file.suffix in (".pt", ".json"):
            assert b"Zanzibar" not in file.read_bytes()


@pytest.mark.parametrize("prompt", [SYSTEM, HINT], ids=["system", "hint"])
def test_served_targets_behind_a_prompt_are_those_of_a_local_computation(
    run: Any, make: Make, models: Models, tmp_path: Path, prompt: dict[str, Any]
) -> None:
    run_dir = run(make(prompt))
    corpus, _ = corpus_of(run_dir, tmp_path)
    local = local_kl(models.teacher, models.student, corpus.eval)
    assert metric(run_dir, "eval/kl")[0] == pytest.approx(local, abs=1e-5)
    assert_not_read(run_dir, tmp_path)


def test_a_prompt_equal_to_the_students_gives_the_same_bits(run: Any, make: Make) -> None:
    contexts = [{"dataset": {}}, STUDENT_TEXT, TEACHER_TEXT]
    assert_same_end(
        run(make({"template": "{{ row_prompt }}"}, contexts=contexts)), run(make(None, contexts=contexts))
    )


@pytest.mark.slow
def test_a_system_prompt_is_internalised(run: Any, make: Make, models: Models, tmp_path: Path) -> None:
    """The teacher is the student itself, and the rows held out are of the kind that it learns from."""
    data = tmp_path / "many.jsonl"
    pairs = (text.split(": ", 1) for text in models.texts)
    data.write_text("".join(json.dumps({"prompt": one, "completion": other}) + "\n" for one, other in pairs))
    run_dir = run(
        make(
            SYSTEM,
            student={"model": str(models.teacher)},
            optimizer={"max_steps": 200, "batch_size": 16, "learning_rate": 3e-3},
            data={"train": [{"path": str(data)}], "chat": True, "eval_fraction": 0.05},
        )
    )
    divergences = metric(run_dir, "eval/kl")
    assert divergences[0] > 1
    assert divergences[200] < 0.1 * divergences[0]


@pytest.mark.parametrize("context", [STUDENT_TEXT, TEACHER_TEXT], ids=["student", "teacher"])
def test_texts_of_a_run_are_compared_behind_the_teachers_prompt(
    run: Any, make: Make, models: Models, tmp_path: Path, context: dict[str, Any]
) -> None:
    """A student that is its teacher differs from it by the prompt alone."""
    same = {
        "student": {"model": str(models.teacher)},
        "optimizer": {"max_steps": 2, "learning_rate": 1e-12},
        "contexts": [context],
        "checkpoint": {"every_steps": 1},
    }
    alone, prompted = run(make(None, **same)), run(make(HINT, **same))
    assert abs(metric(alone, "train/loss")[1]) < 1e-5
    assert metric(prompted, "train/loss")[1] > 0.01
    assert_not_read(prompted, tmp_path)


def test_each_of_several_teachers_sees_its_own_prompt(run: Any, make: Make) -> None:
    """A mixture of a prompted teacher with itself is that teacher; with an unprompted one it is another."""
    alone = metric(run(make(SYSTEM)), "eval/kl")[0]
    assert metric(run(make(SYSTEM, SYSTEM)), "eval/kl")[0] == pytest.approx(alone, rel=1e-4)
    assert metric(run(make(SYSTEM, None)), "eval/kl")[0] != pytest.approx(alone, rel=1e-2)


def test_caches_answer_for_the_ids_that_the_teacher_saw(run: Any, make: Make, tmp_path: Path) -> None:
    cached = {"path": "caches/set", "mode": "write_through"}
    epoch = {"optimizer": {"max_steps": 15}}
    online = run(make(HINT, **epoch))
    through = run(make(HINT, cache=cached, **epoch))
    unprompted = run(make(None, cache=cached))
    assert metric(unprompted, "cache/found")[STEPS] == 0
    offline = run(make(HINT, cache=cached | {"mode": "only"}, **epoch))
    for each in (through, offline):
        assert metric(each, "train/loss") == pytest.approx(metric(online, "train/loss"), abs=1e-5)
        assert metric(each, "eval/kl") == pytest.approx(metric(online, "eval/kl"), abs=1e-5)
    assert metric(offline, "teacher/sequences_asked")[15] == 0
    refused = run(make({"system": "Another one."}, cache=cached | {"mode": "only"}), code=EXIT_FAILED)
    assert "lacks the answers" in failure(refused)


@pytest.mark.parametrize("context", [{"dataset": {}}, TEACHER_TEXT], ids=["rows", "texts"])
def test_a_built_cache_is_learnt_from_behind_the_students_own_prompt(
    run: Any, make: Make, tmp_path: Path, models: Models, context: dict[str, Any]
) -> None:
    cache = {"path": "caches/built"}
    run({**make(HINT, contexts=[context], cache=cache), "task": "cache"})
    reader = CacheReader(tmp_path / "caches" / "built")
    assert all(shard.meta.prompted for shard in reader.shards)
    data = {"train": [{"path": "caches/built"}], "eval_fraction": 0.1}
    offline = make(None, cache=cache | {"mode": "only"}, data=data, evaluation={"metrics": ["perplexity"]})
    offline = run({**offline, "teachers": []})
    assert len(metric(offline, "train/loss")) == STEPS
    assert_not_read(offline, tmp_path)
    refused = run(make(HINT, cache=cache | {"mode": "only"}, data=data), code=EXIT_FAILED)
    assert "Leave the prompt out" in failure(refused)


def test_a_prompt_that_makes_sequences_too_long_is_refused_before_training(run: Any, make: Make) -> None:
    long = {"system": SECRET * 40}
    told = failure(run(make(long), code=EXIT_FAILED))
    assert "behind the prompt that the teacher sees alone" in told
    assert "teachers[].prompt.max_sequence_tokens: 512" in told
    dropped = make(long | {"max_sequence_tokens": 512}, data={"overflow": "drop"})
    assert "data.train has nothing to train on" in failure(run(dropped, code=EXIT_FAILED))


def test_a_teacher_writes_the_texts_of_an_evaluation_behind_its_prompt(
    run: Any, make: Make, rows: Path, tmp_path: Path
) -> None:
    read = [json.loads(line) for line in rows.read_text().splitlines()]
    seen = tmp_path / "seen.jsonl"
    lines = [json.dumps({**row, "prompt": f"{row['prompt']} {row['hint']}"}) for row in read]
    seen.write_text("\n".join(lines))
    evaluation = {
        "metrics": ["perplexity", "chrf"],
        "limit": 6,
        "generation": {"max_new_tokens": 8},
        "teacher_alone": True,
    }

    def scores(path: Path, prompt: dict[str, Any] | None) -> dict[str, float]:
        spec = make(prompt)
        done = run(
            {
                "task": "evaluate",
                "student": spec["student"],
                "teachers": spec["teachers"],
                "data": {"chat": True, "eval": [{"path": str(path)}]},
                "evaluation": evaluation,
            }
        )
        return {name: metric(done, f"eval/{name}")[1] for name in ("perplexity", "chrf")}

    behind, itself = scores(rows, HINT), scores(seen, None)
    assert behind == pytest.approx(itself)
    assert behind["chrf"] != scores(rows, None)["chrf"]
