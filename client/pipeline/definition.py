"""Reads a pipeline file: stages in order, with inputs and outputs by name; every problem is reported at once, with its line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from stillhouse.client.core.errors import file_errors, usage_error
from stillhouse.client.pipeline.nodes import node_problems
from stillhouse.client.pipeline.references import references_in, replace_references, scalars
from stillhouse.client.pipeline.state import STATE_FILE
from stillhouse.client.runfile.source_map import Problem, SourceLocation, invalid
from stillhouse.client.runfile.yaml_reader import RunFileReader

MAX_PIPELINE_BYTES = 1 << 20
MAX_STAGES = 1000
RUN_KINDS = ("cache", "distil", "evaluate")
"""Stages that are one run of the run service; their value is a run file's content."""
COMMAND_KINDS: Mapping[str, tuple[str, ...]] = {
    "generate": ("generate",),
    "score": ("score",),
    "mix": ("data", "mix"),
    "export_prompts": ("data", "export-prompts"),
    "parse": ("data", "parse"),
    "filter": ("data", "filter"),
    "convert": ("data", "convert"),
    "eval": ("eval",),
}
"""Stages that are one command of the client; their value is its options."""
KINDS = (*COMMAND_KINDS, *RUN_KINDS, "command")
RUN_OUTPUTS = ("run", "final")
"""Names of a run that other stages may use: its id, and the path of its final model for run files."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_VALUE = re.compile(r"[^\[\]{}$/\x00-\x1f]{1,100}")
_RESERVED = ("inputs", "outputs")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage for one value of its `for_each`."""

    name: str
    key: str
    """The value of `for_each`; empty without one."""
    variables: Mapping[str, str]
    """The value of `for_each` by the variable's name."""
    kind: str
    """One of KINDS."""
    value: yaml.Node
    """Options, a run, or a command line, with references."""
    inputs: Mapping[str, str]
    """Files that no stage makes, relative to the pipeline file, by name; with references to variables replaced."""
    outputs: Mapping[str, str]
    """Files that the stage makes, relative to the work folder, by name."""
    run_file: str
    """Run file that a run stage reads, relative to the pipeline file; empty if the run stands in the stage."""
    location: SourceLocation

    @property
    def id(self) -> str:
        """`name`, or `name[key]`."""
        return f"{self.name}[{self.key}]" if self.key else self.name

    @property
    def is_run(self) -> bool:
        """True if the stage is a run of the run service."""
        return self.kind in RUN_KINDS


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipeline:
    """A pipeline file as it was written."""

    name: str
    path: Path
    work: Path
    """Folder of outputs and state."""
    stages: tuple[Stage, ...]
    """In the order in which they run."""

    @property
    def directory(self) -> Path:
        """The file's folder; commands run in it, and inputs are relative to it."""
        return self.path.parent

    def named(self, name: str) -> tuple[Stage, ...]:
        """The stages of one name, one for each value of its `for_each`."""
        return tuple(each for each in self.stages if each.name == name)


def load_pipeline(path: Path) -> Pipeline:
    """The pipeline in the file at `path`. Raises StillhouseError(INVALID_SPEC) with every problem, one a line."""
    with file_errors("read", path), path.open("rb") as file:
        content = file.read(MAX_PIPELINE_BYTES + 1)
    if len(content) > MAX_PIPELINE_BYTES:
        raise usage_error(f"{path} is larger than {MAX_PIPELINE_BYTES} bytes; a pipeline is a page of text.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise usage_error(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8.") from error
    return _FileReader(path).read(text)


class _FileReader:
    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.yaml = RunFileReader(str(path))
        self.stages: list[Stage] = []
        self.values: dict[str, tuple[str, ...]] = {}
        """Values by variable."""
        self.variable_of: dict[str, str] = {}
        """Variable of `for_each` by stage; empty without one."""

    def read(self, text: str) -> Pipeline:
        root = self.yaml.compose(text, needs="a pipeline needs stages, each with a name and what it does")
        if root is not None:
            for node, sentence in node_problems(root):
                self.problem(node, "", sentence)
        if root is None or self.yaml.problems:
            raise invalid(self.yaml.problems)
        fields = self.fields(root, "", ("name", "work", "variables", "stages"), "a pipeline")
        name = self.text(fields.get("name"), "name") or self.path.stem
        if not _NAME.fullmatch(name):
            self.problem(
                fields.get("name", root), "name", f'"{name[:80]}" is no name; letters, digits, "-" and "_".'
            )
        work = self.text(fields.get("work"), "work") or f"{self.path.stem}.work"
        for key, node in self.fields(fields.get("variables"), "variables", None, "").items():
            self.values[key] = self.items(node, f"variables.{key}")
        stages = fields.get("stages")
        if not isinstance(stages, yaml.SequenceNode) or not stages.value:
            self.problem(
                stages or root, "stages", "expects a list of stages, each with a name and what it does."
            )
        else:
            for index, node in enumerate(stages.value):
                self.stage(node, f"stages[{index}]")
        if len(self.stages) > MAX_STAGES:
            self.problem(root, "stages", f"makes {len(self.stages)} stages; at most {MAX_STAGES}.")
        if self.yaml.problems:
            raise invalid(self.yaml.problems)
        return Pipeline(name=name, path=self.path, work=self.path.parent / work, stages=tuple(self.stages))

    def stage(self, node: yaml.Node, path: str) -> None:
        fields = self.fields(node, path, ("name", "for_each", "inputs", "outputs", "file", *KINDS), "a stage")
        if not fields:
            return
        name = self.text(fields.get("name"), f"{path}.name")
        if name is None or not _NAME.fullmatch(name) or name in _RESERVED:
            self.problem(
                fields.get("name", node),
                f"{path}.name",
                'is required: letters, digits, "-" and "_", and not "inputs" or "outputs".',
            )
            return
        if name in self.variable_of:
            self.problem(fields["name"], f"{path}.name", f'another stage is named "{name}".')
            return
        kinds = [each for each in KINDS if each in fields]
        if len(kinds) != 1:
            said = f"has {' and '.join(kinds)}" if kinds else "does nothing"
            self.problem(node, path, f"{said}; a stage has one of {', '.join(KINDS)}.")
            return
        [kind] = kinds
        variable = self.text(fields.get("for_each"), f"{path}.for_each") or ""
        if variable and variable not in self.values:
            known = ", ".join(self.values) or "none"
            self.problem(
                fields["for_each"],
                f"{path}.for_each",
                f'"{variable}" is no variable; those of the file: {known}.',
            )
            return
        self.check_kind(
            kind, fields[kind], fields.get("file"), f"{path}.{kind}", has_outputs="outputs" in fields
        )
        inputs = {
            key: self.text(each, f"{path}.inputs.{key}") or ""
            for key, each in self.fields(fields.get("inputs"), f"{path}.inputs", None, "").items()
        }
        outputs = {
            key: self.text(each, f"{path}.outputs.{key}") or ""
            for key, each in self.fields(fields.get("outputs"), f"{path}.outputs", None, "").items()
        }
        run_file = self.text(fields.get("file"), f"{path}.file") or ""
        own = {"": (variable,) if variable else (), "inputs": tuple(inputs), "outputs": tuple(outputs)}
        for text_node in scalars(node):
            self.check_references(text_node, path, own)
        for part in ("inputs", "outputs", "file"):
            for text_node in scalars(fields[part]) if part in fields else ():
                self.check_variables(text_node, f"{path}.{part}")
        self.variable_of[name] = variable
        for value in self.values[variable] if variable else ("",):
            variables = {variable: value} if variable else {}
            self.stages.append(
                Stage(
                    name=name,
                    key=value,
                    variables=variables,
                    kind=kind,
                    value=fields[kind],
                    inputs={key: _with_variables(each, variables) for key, each in inputs.items()},
                    outputs={
                        key: self.output(_with_variables(each, variables), fields.get("outputs", node), path)
                        for key, each in outputs.items()
                    },
                    run_file=_with_variables(run_file, variables),
                    location=self.yaml.location(node),
                )
            )
        self.check_distinct(name, fields.get("outputs", node), path)

    def check_kind(
        self, kind: str, value: yaml.Node, file: yaml.Node | None, path: str, *, has_outputs: bool
    ) -> None:
        if kind == "command" and (not isinstance(value, yaml.SequenceNode) or not value.value):
            self.problem(value, path, "expects a list: the program, then its arguments, without a shell.")
        if kind != "command" and not isinstance(value, yaml.MappingNode):
            what = "a run's fields" if kind in RUN_KINDS else "the command's options"
            self.problem(value, path, f"expects {what}, each as `name: value`; `{{}}` for none.")
        if has_outputs and kind in ("cache", "evaluate"):
            self.problem(value, path, "makes no model, so it has no outputs; only the run of distil has one.")
        if file is not None and kind not in RUN_KINDS:
            self.problem(file, path, f"file names a run file, which only {', '.join(RUN_KINDS)} read.")

    def check_references(self, node: yaml.ScalarNode, path: str, own: Mapping[str, Sequence[str]]) -> None:
        """Checks the references of one text; `own` are the names of the stage itself."""
        for text, reference in references_in(node.value):
            if reference is None:
                sentence = (
                    "is no reference; write ${variable}, ${inputs.NAME}, ${outputs.NAME} or ${STAGE.NAME}."
                )
            elif reference.stage not in own and reference.stage not in self.variable_of:
                earlier = ", ".join(self.variable_of) or "none"
                sentence = f'names "{reference.stage}", which is no earlier stage; those are: {earlier}.'
            else:
                known = own.get(reference.stage)
                keys, known = ([], known) if known is not None else self.names_of(reference.stage)
                if reference.name not in known:
                    sentence = f"is not known here; known names: {', '.join(known) or 'none'}."
                elif reference.key and reference.key not in keys:
                    sentence = (
                        f"has no value {reference.key}; those are: {', '.join(filter(None, keys)) or 'none'}."
                    )
                else:
                    continue
            self.problem(node, path, f"{text} {sentence}")

    def check_variables(self, node: yaml.ScalarNode, path: str) -> None:
        """Checks that a text has no references but to variables."""
        for text, reference in references_in(node.value):
            if reference is not None and reference.stage:
                self.problem(node, path, f"{text} cannot stand here; a path of a stage has variables alone.")

    def names_of(self, stage: str) -> tuple[list[str], Sequence[str]]:
        """The values of `for_each` of an earlier stage, and the names that others may use of it."""
        before = [each for each in self.stages if each.name == stage]
        if not before:
            return [], ()
        names = (*before[0].outputs, *(RUN_OUTPUTS if before[0].is_run else ()))
        return [each.key for each in before], names

    def output(self, text: str, node: yaml.Node, path: str) -> str:
        """A path in the work folder."""
        parts = Path(text).parts
        is_inside = bool(parts) and text.isprintable() and ".." not in parts and parts[0][0] not in "/."
        if not is_inside or parts[0] == STATE_FILE:
            self.problem(node, f"{path}.outputs", f'"{text[:80]}" is no path inside the work folder.')
        return str(Path(text))

    def check_distinct(self, name: str, node: yaml.Node, path: str) -> None:
        seen: dict[Path, str] = {}
        holders: dict[Path, str] = {}
        """A stage by each folder above its outputs."""
        for each in self.stages:
            for path_of in map(Path, each.outputs.values()):
                above = [path_of, *path_of.parents][:-1]
                owner = next((seen[one] for one in above if one in seen), holders.get(path_of))
                if owner is not None and each.name == name:
                    self.problem(
                        node,
                        f"{path}.outputs",
                        f"{each.id} writes {path_of}, as {owner} does, or a path inside the other; give each its own, such as "
                        "with ${variable} in it.",
                    )
                    return
                seen[path_of] = each.id
                holders |= dict.fromkeys(above[1:], each.id)

    def fields(
        self, node: yaml.Node | None, path: str, known: tuple[str, ...] | None, of: str
    ) -> dict[str, yaml.Node]:
        """The fields of a mapping; with problems for unknown and doubled ones."""
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            self.problem(node, path, "expects fields, each as `name: value`.")
            return {}
        found: dict[str, yaml.Node] = {}
        for key, value in node.value:
            below = f"{path}.{key.value}" if path else str(key.value)
            if not isinstance(key, yaml.ScalarNode):
                self.problem(key, path, "expects a field name; this is a list or a set of fields.")
            elif known is not None and key.value not in known:
                self.problem(
                    key, below, f"there is no such field; the fields of {of} are: {', '.join(known)}."
                )
            elif known is None and not _NAME.fullmatch(key.value):
                self.problem(key, below, 'expects a name of letters, digits, "-" and "_".')
            elif key.value in found:
                self.problem(key, below, "is given twice; keep one.")
            else:
                found[key.value] = value
        return found

    def text(self, node: yaml.Node | None, path: str) -> str | None:
        if node is None:
            return None
        if not isinstance(node, yaml.ScalarNode):
            self.problem(node, path, "expects one value.")
            return None
        return str(node.value)

    def items(self, node: yaml.Node, path: str) -> tuple[str, ...]:
        """The values of a variable."""
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        found = []
        for item in items:
            value = self.text(item, path) or ""
            if not _VALUE.fullmatch(value):
                self.problem(
                    item, path, "a value is text without brackets, braces, dollar signs and slashes."
                )
            elif value in found:
                self.problem(item, path, f'"{value}" is given twice; keep one.')
            else:
                found.append(value)
        if not found:
            self.problem(node, path, "expects a list of values.")
        return tuple(found)

    def problem(self, node: yaml.Node, path: str, sentence: str) -> None:
        self.yaml.problems.append(Problem(location=self.yaml.location(node), path=path, sentence=sentence))


def _with_variables(text: str, variables: Mapping[str, str]) -> str:
    return replace_references(text, lambda reference: variables.get(reference.name, str(reference)))
