"""`stillhouse run compare`: the settings in which runs differ, and their last metrics side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from stillhouse.client.terminal.session import Session, command

if TYPE_CHECKING:
    from stillhouse.client.trainer.run_handle import RunHandle

MIN_RUNS = 2


@command(name="compare")
@click.argument("runs", metavar="RUN RUN...", nargs=-1, required=True)
@click.option(
    "--key", "keys", multiple=True, metavar="NAME", help="A metric, such as eval/kl; may be repeated."
)
def compare(session: Session, runs: tuple[str, ...], keys: tuple[str, ...]) -> None:
    """Show where the effective settings of runs differ, and their last metrics.

    The metrics are loss and evaluation, or what --key names; with --json all of them.
    """
    from stillhouse.client.terminal.render import columns, number_text

    if len(runs) < MIN_RUNS:
        raise click.UsageError("compare needs two runs or more; `stillhouse run show` shows one.")
    handles = [session.run(run) for run in runs]
    settings = _differences([_settings(handle) for handle in handles])
    metrics = _last_values(handles, keys)
    if session.as_json:
        ids = [handle.id for handle in handles]
        session.emit({"runs": ids, "settings": settings, "metrics": metrics})
        return
    header = ("", *(handle.id for handle in handles))
    rows = [(path, *map(_text, values)) for path, values in settings.items()]
    session.say(columns([("SETTINGS", *header[1:]), *rows]))
    if not rows:
        session.say("The runs have the same settings.")
    main = [name for name in metrics if name in keys or (not keys and _is_main(name))]
    shown = [
        (name, *("-" if value is None else number_text(value) for value in metrics[name])) for name in main
    ]
    session.say("\n" + columns([("METRICS", *header[1:]), *shown]))
    if not shown:
        session.say("The runs have no such metrics yet.")


def _is_main(name: str) -> bool:
    return name == "train/loss" or name.startswith("eval/")


def _settings(handle: RunHandle) -> dict[str, Any]:
    """Returns the effective settings by their paths in a run file."""
    from google.protobuf.json_format import MessageToDict

    from stillhouse.client.pipeline.execution import REQUEST_LABEL

    spec = handle.get().effective_spec
    spec.labels.pop(REQUEST_LABEL, None)  # no two stages of pipelines share it
    return dict(_flat(MessageToDict(spec, preserving_proto_field_name=True), ""))


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, each in value.items():
            yield from _flat(each, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
        for number, each in enumerate(value):
            yield from _flat(each, f"{path}[{number}]")
    else:
        yield path, value


def _differences(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Returns the values of each setting that is not the same in all runs; None where a run has none."""
    paths = list(dict.fromkeys(path for each in settings for path in each))
    values = {path: [each.get(path) for each in settings] for path in paths}
    return {path: found for path, found in values.items() if any(each != found[0] for each in found)}


def _last_values(handles: Sequence[RunHandle], keys: tuple[str, ...]) -> dict[str, list[float | None]]:
    """Returns the last value of each metric in each run; None where a run has none."""
    series = [handle.metrics(*keys) for handle in handles]
    names = sorted({name for each in series for name in each})
    return {
        name: [
            float(each[name].values[-1]) if name in each and len(each[name].values) else None
            for each in series
        ]
        for name in names
    }


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
