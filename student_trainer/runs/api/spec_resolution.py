"""Resolves a run's paths and devices on this host: every problem at once, nothing outside the allowed roots."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from stillhouse.protos.cache.reader import CacheReader, shard_paths
from stillhouse.protos.errors import FieldViolation, StillhouseError, first_line
from stillhouse.protos.files.adapter import FILES
from stillhouse.protos.rows.conversation import is_json_list, parse_tools
from stillhouse.protos.rows.field_error import FieldError
from stillhouse.protos.rows.named_templates import is_file_name, read_setting
from stillhouse.protos.rows.reading.line_pairs import pair_of
from stillhouse.protos.rows.reading.plugins import plugin_of
from stillhouse.protos.rows.reading.tables import is_hub_id as is_hub_dataset
from stillhouse.student_trainer.config.checks import invalid_spec
from stillhouse.student_trainer.config.evaluation_set import EvaluationSetConfig
from stillhouse.student_trainer.config.resources import TRACKERS, NotifyConfig, TrackerConfig
from stillhouse.student_trainer.config.schema import (
    ALL_LINEAR,
    CacheConfig,
    DatasetConfig,
    RunConfig,
    StudentConfig,
)
from stillhouse.student_trainer.config.settled.matmul_dtype import Processor, settle
from stillhouse.student_trainer.config.settled.staleness import settle_staleness
from stillhouse.student_trainer.runs.api.hub_lookup import HubId
from stillhouse.student_trainer.runs.api.module_names import unknown_modules
from stillhouse.student_trainer.runs.api.weight_files import WeightFilesError, check_weights
from stillhouse.student_trainer.runs.store.datasets import Reference, StoredDataset
from stillhouse.student_trainer.runs.supervision.device_slots import DeviceRequest, DeviceSlots

RUN_ID = re.compile(r"[a-z2-7]{12}")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
MAX_WEBHOOKS = 8
OWN_FOLDERS = ("datasets", "runs", "caches", "adapters")
"""Folders of the data directory that specs may name; its database and credentials are out of reach."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """Folders, devices and datasets of this service's host."""

    data_dir: Path
    roots: Sequence[Path]
    """Folders below which specs may name files."""
    slots: DeviceSlots
    find_dataset: Callable[[str], StoredDataset | None]
    """An uploaded dataset by its name in a spec; None if there is none."""
    processor: Processor
    find_webhook_host: Callable[[str], object]
    """The host of a URL that may be posted to; StillhouseError if it may not."""
    tracker_problem: Callable[[TrackerConfig], FieldViolation | None]
    """The field of a tracker for which this service cannot use it, and why; None if it can."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolution:
    """A configuration on this host, and what is left to look up or to refuse."""

    config: RunConfig
    """With absolute paths, its device count and its numeric types."""
    problems: Sequence[FieldViolation]
    hub_ids: Sequence[HubId]
    """Names that are no directory of this host, and may be hub ids."""
    datasets: Sequence[StoredDataset]
    """Uploaded datasets that it names, pinned."""


def resolve(config: RunConfig, host: Host, problems: Sequence[FieldViolation] = ()) -> Resolution:
    """Looks at the files and devices that `config` names; a field that is in `problems` already gets no second one."""
    resolver = _Resolver(host, revision=config.student.revision)
    data, cache, baseline = config.data, resolver.cache(config.cache), config.evaluation.baseline
    resolved = replace(
        config,
        student=resolver.student("student", config.student),
        data=replace(
            data,
            train=resolver.datasets("data.train", data.train),
            eval=resolver.datasets("data.eval", data.eval),
            date=data.date or _date(None if resolver.violations else cache),
            chat_template=resolver.text("data.chat_template", data.chat_template, is_file_name),
            tools=resolver.text("data.tools", data.tools, lambda text: not is_json_list(text)),
        ),
        cache=cache,
        evaluation=replace(
            config.evaluation,
            sets=resolver.evaluation_sets(config.evaluation.sets),
            baseline=baseline and resolver.student("evaluation.baseline", baseline),
        ),
    )
    resolver.weights(resolved)
    resolver.lora_modules(resolved)
    resolver.webhooks(config.notify)
    resolver.trackers(config.trackers)
    resolved = resolver.devices(resolved)
    return resolver.resolution(resolved, problems)


def resolve_rendering(config: RunConfig, host: Host, problems: Sequence[FieldViolation] = ()) -> Resolution:
    """As `resolve`, for what decides on the encoding of rows alone: tokenizer, chat template and tools."""
    resolver = _Resolver(host, revision=config.student.revision)
    data, model = config.data, config.student.model
    resolved = replace(
        config,
        student=replace(config.student, model=model and resolver.model("student.model", model)),
        data=replace(
            data,
            date=data.date or _date(None),
            chat_template=resolver.text("data.chat_template", data.chat_template, is_file_name),
            tools=resolver.text("data.tools", data.tools, lambda text: not is_json_list(text)),
        ),
    )
    return resolver.resolution(resolved, problems)


def resolve_datasets(config: RunConfig, host: Host, problems: Sequence[FieldViolation] = ()) -> Resolution:
    """As `resolve`, for the training datasets alone."""
    resolver = _Resolver(host, revision=config.student.revision)
    train = resolver.datasets("data.train", config.data.train)
    return resolver.resolution(replace(config, data=replace(config.data, train=train)), problems)


def resolve_devices(config: RunConfig, host: Host) -> RunConfig:
    """`config` with its device count and numeric types, and everything else as it is. Raises as `resolve` does."""
    resolver = _Resolver(host, revision=config.student.revision)
    resolved = resolver.devices(config)
    if resolver.violations:
        raise invalid_spec(resolver.violations)
    return resolved


@dataclass(slots=True)
class _Resolver:
    host: Host
    revision: str
    violations: list[FieldViolation] = field(default_factory=list)
    hub_ids: list[HubId] = field(default_factory=list)
    stored: dict[str, StoredDataset] = field(default_factory=dict)

    def resolution(self, config: RunConfig, problems: Sequence[FieldViolation]) -> Resolution:
        """The outcome; a field that is in `problems` already gets no second one."""
        named = {each.field for each in problems}
        return Resolution(
            config=config,
            problems=[*problems, *(each for each in self.violations if each.field not in named)],
            hub_ids=[each for each in self.hub_ids if each.field not in named],
            datasets=list(self.stored.values()),
        )

    def student(self, where: str, student: StudentConfig) -> StudentConfig:
        """The student with absolute paths."""
        return replace(
            student,
            model=student.model and self.model(f"{where}.model", student.model),
            adapter=student.adapter and self.adapter(f"{where}.adapter", student.adapter),
        )

    def webhooks(self, hooks: Sequence[NotifyConfig]) -> None:
        """Refuses addresses that this service does not post to."""
        if len(hooks) > MAX_WEBHOOKS:
            self._refuse("notify", f"it has {len(hooks)} entries; give at most {MAX_WEBHOOKS}.")
        for index, hook in enumerate(hooks[:MAX_WEBHOOKS]):
            try:
                self.host.find_webhook_host(hook.url)
            except StillhouseError as error:
                self._refuse(f"notify[{index}].url", error.message)

    def trackers(self, trackers: Sequence[TrackerConfig]) -> None:
        """Refuses trackers whose library or server this service does not have."""
        for index, tracker in enumerate(trackers[: len(TRACKERS)]):
            problem = self.host.tracker_problem(tracker)
            if problem is not None:
                self._refuse(f"trackers[{index}].{problem.field}", problem.description)

    def model(self, where: str, name: str) -> str:
        """An absolute path, or a name that may be a hub id as it is."""
        path = self._local(where, name)
        if path is not None and path.exists():
            return self._directory_with(["config.json"], where, name, path)
        if _is_hub_id(name):
            self.hub_ids.append(HubId(field=where, name=name, revision=self.revision))
        elif path is not None:
            self._refuse(
                where, f'"{name}" is neither a directory on the trainer\'s host nor a Hugging Face id.'
            )
        return name

    def adapter(self, where: str, name: str) -> str:
        """An absolute path."""
        path = self._local(where, name)
        if path is not None and path.exists():
            return self._directory_with(FILES, where, name, path)
        if path is not None or _is_hub_id(name):
            self._refuse(
                where,
                f'"{name}" is not a directory on the trainer\'s host; name that of a LoRA adapter, such as '
                '"runs/…/final/adapter".',
            )
        return name

    def _directory_with(self, needed: Sequence[str], where: str, name: str, path: Path) -> str:
        missing = [each for each in needed if not (path / each).is_file()]
        if missing:
            self._refuse(
                where,
                f'"{name}" holds no {" and no ".join(missing)}; give a directory in Hugging Face layout.',
            )
        return str(path)

    def weights(self, config: RunConfig) -> None:
        """Refuses a model on this host whose files lack weights."""
        directory = Path(config.student.model)
        if (
            config.student.from_config
            or not directory.is_absolute()
            or not (directory / "config.json").is_file()
        ):
            return
        try:
            check_weights(directory)
        except WeightFilesError as error:
            self._refuse("student.model", f'"{directory}" {error}')

    def lora_modules(self, config: RunConfig) -> None:
        """Refuses names of modules that a model on this host does not have."""
        student = config.student
        names = [each for each in (student.lora.target_modules if student.lora else ()) if each != ALL_LINEAR]
        problem = unknown_modules(Path(student.model), names) if names else None
        if problem:
            self._refuse("student.lora.target_modules", f'{problem} "{ALL_LINEAR}" takes every linear layer.')

    def datasets(self, where: str, datasets: Sequence[DatasetConfig]) -> tuple[DatasetConfig, ...]:
        """The datasets with absolute paths."""
        places = (f"{where}[{i}].path" for i in range(len(datasets)))
        return tuple(
            replace(each, path=self._dataset(place, each.path))
            for place, each in zip(places, datasets, strict=True)
        )

    def text(self, where: str, value: str, is_file: Callable[[str], bool]) -> str:
        """The text of a small file that a setting names; the setting itself if it is no file's name."""
        if not is_file(value):
            return value
        path = self._local(where, value)
        if path is None or not path.is_file():
            if path is not None or _is_hub_id(value):
                self._refuse(
                    where,
                    f'"{value[:200]}" is no file on the trainer\'s host; give its text, or lay it beside the run file.',
                )
            return value
        try:
            text = read_setting(path)
        except (OSError, ValueError) as error:
            self._refuse(where, f'"{value[:200]}" cannot be read ({first_line(error)}); correct the file.')
            return value
        if where == "data.tools":
            self._check_tools(where, text)
        return text

    def _check_tools(self, where: str, text: str) -> None:
        try:
            parse_tools(text)
        except FieldError as error:
            self._refuse(where, f"{error.field} {error.problem}")

    def evaluation_sets(self, sets: Sequence[EvaluationSetConfig]) -> tuple[EvaluationSetConfig, ...]:
        """The sets with absolute paths."""
        return tuple(
            replace(each, path=self._dataset(f"evaluation.sets[{i}].path", each.path))
            for i, each in enumerate(sets)
        )

    def cache(self, cache: CacheConfig | None) -> CacheConfig | None:
        """The cache with an absolute path. One that is written lies below caches/: roots are there to be read."""
        if cache is None:
            return None
        path = self._local("cache.path", cache.path)
        if path is None:
            return cache
        own = (self.host.data_dir / "caches").resolve()
        writes = cache.mode == "write_through"
        if (writes and not path.is_relative_to(own)) or path == own:
            self._refuse(
                "cache.path",
                f'"{cache.path}" is not a path for a cache; name one below caches/, such as "caches/my-set".',
            )
        return replace(cache, path=str(path))

    def devices(self, config: RunConfig) -> RunConfig:
        """`config` with its device count, precision, matmul dtype and staleness of rollouts settled."""
        resources, slots = config.resources, self.host.slots
        if resources.gpu_count is None and not resources.gpus:
            resources = replace(resources, gpu_count=max(1, resources.num_processes) if slots.gpus else 0)
        need = DeviceRequest(gpus=resources.gpus, count=resources.gpu_count or 0)
        lack = slots.why_never(need)
        if lack is not None:
            self._refuse("resources.gpus" if resources.gpus else "resources.gpu_count", f"{lack}.")
        optimizer = config.optimizer
        if optimizer.precision is None:
            optimizer = replace(optimizer, precision="fp32" if need.on_cpu else "bf16")
        elif optimizer.precision == "fp16" and need.on_cpu:
            self._refuse(
                "optimizer.precision", '"fp16" needs a GPU, and this run uses the CPU; use bf16 or fp32.'
            )
        if optimizer.name == "paged_adamw_8bit" and need.on_cpu:
            self._refuse(
                "optimizer.name",
                '"paged_adamw_8bit" moves its moments between GPU and host, and this run uses the CPU; use "adamw_8bit".',
            )
        matmul_dtype = settle(optimizer, self.host.processor) if need.on_cpu else None
        optimizer = replace(optimizer, matmul_dtype=matmul_dtype)
        settled = settle_staleness(config, on_cpu=need.on_cpu)
        return replace(settled, resources=resources, optimizer=optimizer)

    def _dataset(self, where: str, name: str) -> str:
        stored = self.host.find_dataset(name)
        if stored is not None:
            self.stored[stored.name] = stored
            name = stored.file
        elif (reference := Reference.parse(name)) is not None and reference.version is not None:
            self._refuse(
                where,
                f'"{name}" was not uploaded to this service; `stillhouse data push` does that, and `stillhouse data list` '
                "shows what was.",
            )
            return name
        if plugin_of(name) is not None:
            return name
        path = self._local(where, name)
        if path is not None and (path.exists() or pair_of(path)):
            return str(path)
        if is_hub_dataset(name) and not _is_own(name):
            self.hub_ids.append(HubId(field=where, name=name, kind="dataset"))
        elif path is not None or _is_hub_id(name):
            self._refuse(
                where,
                f'"{name}" does not exist on the trainer\'s host; upload it with `stillhouse data push`.',
            )
        return name

    def _local(self, where: str, name: str) -> Path | None:
        """The real path that `name` means; None, and a violation, if it is out of bounds."""
        data_dir = self.host.data_dir.resolve()
        try:
            path = (data_dir / name if _is_own(name) else Path(name)).resolve()
        except (OSError, RuntimeError, ValueError):
            self._refuse(where, f'"{name}" is not a path.')
            return None
        if path.is_relative_to(data_dir):
            if path.relative_to(data_dir).parts[:1] in {(folder,) for folder in OWN_FOLDERS}:
                return self._readable(where, name, path)
        elif any(path.is_relative_to(root.resolve()) for root in self.host.roots):
            return self._readable(where, name, path)
        if _is_hub_id(name):
            return None  # a hub id is never looked for outside of the roots
        self._refuse(
            where,
            f'"{name}" is outside of what this service may read; start it with --allow-root, or upload the file.',
        )
        return None

    def _readable(self, where: str, name: str, path: Path) -> Path | None:
        """`path`, whether it is there or not; None, and a violation, if this host cannot tell."""
        try:
            path.exists()
        except OSError as error:
            self._refuse(where, f'"{name[:200]}" cannot be read on the trainer\'s host ({error.strerror}).')
            return None
        return path

    def _refuse(self, where: str, description: str) -> None:
        self.violations.append(FieldViolation(where, description))


def _is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not _is_own(name)


def _is_own(name: str) -> bool:
    """True if `name` is a path of the data directory."""
    return name.partition("/")[0] in OWN_FOLDERS and "/" in name


def _date(cache: CacheConfig | None) -> str:
    """Returns the day that templates are told: the cache's, so that the text is found in it, or today."""
    with suppress(StillhouseError):  # there is none yet, or the run itself reports what is wrong with it
        for shard in shard_paths(Path(cache.path))[-1:] if cache else ():
            with closing(CacheReader(shard)) as reader:
                if reader.metas[0].template_date:
                    return reader.metas[0].template_date
    return datetime.now(UTC).date().isoformat()
