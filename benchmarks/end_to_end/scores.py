"""Scores kept students with the float32 teacher's whole distributions: `python -m benchmarks.end_to_end.scores KIND WORK SIZES ARMS`.

KIND is "forward": KL(teacher || student) on held-out texts; or "reverse": KL(student || teacher) on what the student itself
writes behind held-out prompts, with one seed. ARMS is JSON: lists of folders by arm, each named by its step. Prints JSON:
`scores`, nats per token, and `lengths`, the tokens of each text that was written, by arm and step. A folder that cannot be
scored is left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.end_to_end.runs import LORA_RANK
from benchmarks.end_to_end.sizes import Sizes, Work

ROWS = 16
"""Texts of a pass."""


def main() -> None:
    """Prints the scores."""
    kind, work, sizes = sys.argv[1], Work(Path(sys.argv[2])), Sizes(**json.loads(sys.argv[3]))
    arms: dict[str, list[str]] = json.loads(sys.argv[4])
    rows = [HeldOut(**each) for each in json.loads(work.held_out.read_text())]
    teacher = AutoModelForCausalLM.from_pretrained(work.teacher, dtype=torch.float32).eval()
    students: dict[tuple[str, str], Any] = {}
    for arm, folders in arms.items():
        for folder in map(Path, folders):
            try:
                students[arm, folder.name] = _load(
                    folder, work.student if kind == "forward" else work.warm_student
                )
            except (OSError, RuntimeError, ValueError) as error:
                print(f"{arm}, step {folder.name}: {error}", file=sys.stderr)
    with torch.no_grad():
        if kind == "forward":
            scored = [(each, list[int]()) for each in _forward(teacher, list(students.values()), rows)]
        else:
            scored = [_reverse(teacher, each, rows, sizes) for each in students.values()]
    scores: dict[str, dict[str, float]] = {}
    lengths: dict[str, dict[str, list[int]]] = {}
    for (arm, step), (value, own) in zip(students, scored, strict=True):
        scores.setdefault(arm, {})[step] = value
        lengths.setdefault(arm, {})[step] = own
    print(json.dumps({"scores": scores, "lengths": lengths}))


class HeldOut(NamedTuple):
    """A text that no model has seen."""

    token_ids: list[int]
    num_prompt: int
    """Tokens at its beginning that are not scored."""


def _load(folder: Path, base: Path) -> Any:
    """A student that TRL's arms or a training process has saved; `base` has its configuration and first weights."""
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel

        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return PeftModel.from_pretrained(plain, folder).merge_and_unload().eval()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    weights: dict[str, Tensor] = {}
    if (folder / "weights.pt").exists():
        weights = torch.load(folder / "weights.pt", weights_only=True)
    elif folder.name != "0":
        for path in sorted(folder.glob("*.safetensors")):
            weights |= load_file(path)
        if not weights:
            raise OSError(f"{folder} holds no weights")
    if any(".lora_A." in name for name in weights):
        model = _with_adapter(model, weights)
    missing = model.load_state_dict(weights, strict=False)
    if missing.unexpected_keys:
        raise ValueError(f"{folder} holds other weights, such as {missing.unexpected_keys[0]}")
    return model.eval()


def _with_adapter(model: Any, weights: Mapping[str, Tensor]) -> Any:
    """A model that takes the adapter's weights of a checkpoint of a training process."""
    from peft import LoraConfig, get_peft_model

    heads = (head for head, found, _ in (name.partition(".lora_A.") for name in weights) if found)
    targets = {head.removeprefix("base_model.model.") for head in heads}
    config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=sorted(targets))
    return get_peft_model(model, config)


def _forward(teacher: Any, students: Sequence[Any], held_out: Sequence[HeldOut]) -> list[float]:
    """KL of each student, over the tokens behind prompts."""
    totals, count = [0.0 for _ in students], 0
    for first in range(0, len(held_out), ROWS):
        rows = held_out[first : first + ROWS]
        longest = max(len(each.token_ids) for each in rows)
        ids = torch.tensor([[*each.token_ids, *[0] * (longest - len(each.token_ids))] for each in rows])
        places = torch.arange(longest)
        mask = places < torch.tensor([[len(each.token_ids)] for each in rows])
        counted = (mask & (places >= torch.tensor([[each.num_prompt] for each in rows])))[:, 1:]
        count += int(counted.sum())

        def logprobs(model: Any, ids: Tensor = ids, mask: Tensor = mask, counted: Tensor = counted) -> Tensor:
            logits: Tensor = model(input_ids=ids, attention_mask=mask.long()).logits
            return logits[:, :-1][counted].log_softmax(-1)

        log_p = logprobs(teacher)
        probs = log_p.exp()
        for number, student in enumerate(students):
            totals[number] += float((probs * (log_p - logprobs(student))).sum())
    return [each / count for each in totals]


def _reverse(
    teacher: Any, student: Any, held_out: Sequence[HeldOut], sizes: Sizes
) -> tuple[float, list[int]]:
    """KL of a student, and the tokens of each of its texts."""
    torch.manual_seed(0)
    total, lengths = 0.0, list[int]()
    for first in range(0, len(held_out), ROWS):
        heads = [
            each.token_ids[: each.num_prompt or sizes.prompt_tokens]
            for each in held_out[first : first + ROWS]
        ]
        longest = max(map(len, heads))
        prompts = torch.tensor([[0] * (longest - len(each)) + each for each in heads])
        mask = (torch.arange(longest) >= torch.tensor([[longest - len(each)] for each in heads])).long()
        written = student.generate(
            input_ids=prompts,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=sizes.new_tokens,
            pad_token_id=0,
        )
        ends = torch.isin(written[:, longest:], torch.tensor(_end_ids(student)))
        counted = ends.int().cumsum(-1) - ends.int() == 0
        mask = torch.cat([mask, torch.ones_like(ends).long()], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        log_p, log_q = (
            model(input_ids=written, attention_mask=mask, position_ids=positions)
            .logits[:, longest - 1 : -1][counted]
            .log_softmax(-1)
            for model in (teacher, student)
        )
        total += float((log_q.exp() * (log_q - log_p)).sum())
        lengths += counted.sum(-1).tolist()
    return total / sum(lengths), lengths


def _end_ids(model: Any) -> list[int]:
    named = model.generation_config.eos_token_id
    return [] if named is None else list(named) if isinstance(named, list) else [int(named)]


if __name__ == "__main__":
    main()
