"""Sizes that all arms of a comparison share, and the files of its work folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Models, data and steps."""

    vocabulary: int = 4096
    rows: str = "texts"
    """Form of given rows: "pairs" of prompt and completion, of which completions are learnt, or whole "texts"."""
    teacher_hidden: int = 256
    teacher_layers: int = 6
    student_hidden: int = 128
    student_layers: int = 2
    heads: int = 4
    teacher_steps: int = 300
    """Steps in which the teacher learns the text, before anything is measured."""
    warm_steps: int = 150
    """Steps in which the student of on-policy arms does."""
    length: int = 160
    """Longest row, in tokens."""
    batch: int = 16
    steps: int = 80
    learning_rate: float = 3e-3
    precision: str = "fp32"
    """Of training, in all programs, and of their teachers: "fp32", or "bf16" under autocast."""
    seed: int = 0
    """Seed of training: of the order of rows, and of what students write."""
    seeds: int = 1
    """Seeds whose order of prompts is made."""
    on_policy: bool = False
    """Rows of prompt and completion are prompts of on-policy arms, whose student has learnt where texts end."""
    held_out_rows: int = 64
    prompt_tokens: int = 16
    """Tokens of a prompt: of "texts", or the most of "pairs"."""
    new_tokens: int = 64
    kept: int = 8
    """Students of a run that are kept, to be scored."""
    apart: bool = False
    """Student and services have half of the cores each, as on two hosts."""

    @property
    def has_pairs(self) -> bool:
        """True for rows of prompt and completion."""
        return self.rows == "pairs"

    @property
    def teacher_dtype(self) -> str:
        """Dtype of a teacher's weights."""
        return {"fp32": "float32", "bf16": "bfloat16"}[self.precision]

    @property
    def snapshots(self) -> list[int]:
        """Steps after which a student is kept: equal parts of the run."""
        every = max(1, self.steps // self.kept)
        return sorted({*range(every, self.steps + 1, every), self.steps})

    @property
    def every(self) -> int:
        """Steps between two of them."""
        return self.snapshots[0]


DEFAULT = Sizes()


@dataclass(frozen=True, slots=True)
class Work:
    """The folder of one comparison: models and data, which are made once, and the arms' results."""

    path: Path

    @property
    def teacher(self) -> Path:
        """The trained teacher."""
        return self.path / "teacher"

    @property
    def student(self) -> Path:
        """The student with random weights."""
        return self.path / "student"

    @property
    def warm_student(self) -> Path:
        """The student after a few steps of cross-entropy."""
        return self.path / "student-warm"

    @property
    def train(self) -> Path:
        """JSONL of texts, or of prompts and completions."""
        return self.path / "train.jsonl"

    @property
    def prompts(self) -> Path:
        """JSONL of prompts and completions."""
        return self.path / "prompts.jsonl"

    @property
    def rows(self) -> Path:
        """JSON: the token ids and masks of all rows, in the order of the run's steps."""
        return self.path / "rows.json"

    def prompt_rows(self, sizes: Sizes) -> Path:
        """JSON: as `rows`, of on-policy arms with the seed of `sizes`."""
        return self.path / f"prompt_rows-{sizes.seed}.json"

    @property
    def held_out(self) -> Path:
        """JSON: `token_ids` of texts that no model has seen, and `num_prompt`, the number of those that are not scored."""
        return self.path / "held_out.json"

    def fits(self, sizes: Sizes) -> bool:
        """True if the folder was made with these sizes; how arms compute and what they keep is none of its matter."""
        path = self.path / "sizes.json"
        made = Sizes(**json.loads(path.read_text())) if path.exists() else None
        if made is None or made.seeds < sizes.seeds:
            return False
        free = {name: getattr(sizes, name) for name in ("precision", "apart", "kept", "seed", "seeds")}
        return replace(made, **free) == sizes

    def mark_ready(self, sizes: Sizes) -> None:
        """Records that everything is there."""
        (self.path / "sizes.json").write_text(json.dumps(asdict(sizes)))

    def arm(self, name: str, sizes: Sizes) -> Path:
        """Folder of an arm."""
        seed = f"-seed-{sizes.seed}" if sizes.seed else ""
        return self.path / f"arms-{sizes.precision}{'-apart' if sizes.apart else ''}{seed}" / name

    def cache(self, sizes: Sizes) -> Path:
        """Cache of the teacher's targets."""
        return self.path / f"cache-{sizes.precision}"
