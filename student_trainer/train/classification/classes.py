"""The classes of a run: settled between student, run file and teachers by name, and the meaning of labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.config.checks import invalid_field
from stillhouse.student_trainer.train.classification.rows import LABEL, Label, LabelledExample

MAX_LISTED = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Classes:
    """Classes of a run."""

    names: tuple[str, ...]
    """In the order of the student's logits."""
    numbered: tuple[str, ...] | None
    """In the order of labels that are numbers; None if student and teachers number them differently, and the run file does
    not say."""

    @classmethod
    def settle(
        cls, configured: Sequence[str], student: Sequence[str], teachers: Mapping[str, Sequence[str]]
    ) -> Classes:
        """The classes by data.classes, by the student's model and by the teachers, each empty if unknown.

        Raises StillhouseError(INVALID_SPEC) if nothing names them, or two sides have other ones.
        """
        known = {name: tuple(each) for name, each in teachers.items() if each}
        names = tuple(student) or tuple(configured) or next(iter(known.values()), ())
        if not names:
            raise invalid_field(
                "data.classes", "is required: neither the student's model nor a teacher names classes."
            )
        _require_same("data.classes", configured, names, "the student's model")
        origin = "the student's model" if student else "data.classes" if configured else "the first teacher"
        for number, (name, each) in enumerate(known.items()):
            _require_same(
                f"teachers[{number}]", each, names, origin, subject=f"the classes of teacher {name}".strip()
            )
        orders = {names, *known.values()}
        numbered = tuple(configured) or (names if len(orders) == 1 else None)
        return cls(names=names, numbered=numbered)

    def index(self, label: Label) -> int:
        """Place of a label among `names`. Raises KeyError with what is wrong for one that is no class."""
        if isinstance(label, str):
            if label not in self.names:
                raise KeyError(f'is "{label[:80]}", which is no class; there are {_listed(self.names)}')
            return self.names.index(label)
        if self.numbered is None:
            raise KeyError(
                f"is the number {label}, and student and teachers number the classes differently. Write the name, or set "
                "data.classes to the order that the numbers mean"
            )
        if not 0 <= label < len(self.numbered):
            raise KeyError(
                f"is {label}, which is no class; there are 0 to {len(self.numbered) - 1} ({_listed(self.numbered)})"
            )
        return self.names.index(self.numbered[label])

    def check(self, examples: Iterable[object]) -> None:
        """Returns if the label of every example is a class. Raises StillhouseError(DATASET_INVALID) with file and row."""
        for each in examples:
            assert isinstance(each, LabelledExample), "a classifier's rows"
            if each.label is None:
                continue
            try:
                self.index(each.label)
            except KeyError as error:
                raise StillhouseError(
                    Reason.DATASET_INVALID,
                    f"{each.place}, field {LABEL}: {error.args[0]}. Correct the row.",
                    metadata={"place": each.place, "field": LABEL},
                ) from error


def _require_same(
    field: str, found: Sequence[str], names: Sequence[str], of: str, *, subject: str = ""
) -> None:
    if not found or set(found) == set(names):
        return
    alone = sorted(set(found) - set(names))
    lacking = sorted(set(names) - set(found))
    said = f"{subject} have " if subject else "has "
    raise invalid_field(
        field,
        f"{said}{_listed(alone) or 'nothing more'} that {of} lacks, and not {_listed(lacking) or 'anything less'}: classes are "
        "compared by name. Give both sides the same names (id2label in config.json).",
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f'"{each[:40]}"' for each in names[:MAX_LISTED])
    return f"{shown}, …" if len(names) > MAX_LISTED else shown
