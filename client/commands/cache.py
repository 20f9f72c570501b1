"""`stillhouse cache build | list | info | verify`: builds and inspects caches of teacher outputs."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stillhouse.client.commands.run.create import load, submit, submit_options
from stillhouse.client.terminal.session import Session, command
from stillhouse.client.trainer.cache_list import SUMMARY, caches_of
from stillhouse.client.trainer.run_lookup import CACHE_TASKS

if TYPE_CHECKING:
    from stillhouse.client.trainer.run_handle import RunHandle


@click.group()
def cache() -> None:
    """Cache teacher outputs, to train from them without a teacher.

    A cache is a folder of Parquet files: below caches/ on the trainer's host, or anywhere on this machine.
    """


@command(cache)
@submit_options
@click.option("--to", "place", metavar="caches/NAME", default="", help="Overrides the file's cache.path.")
def build(
    session: Session,
    *,
    file: str,
    place: str,
    overrides: tuple[str, ...],
    watch: bool,
    push: bool,
    request_id: str,
) -> int:
    """Query the teacher for all text of run FILE, and cache its outputs.

    FILE is a run file like any other: data, tokenizer, loss and evaluation determine the queries, so that the same file
    with cache.mode: only trains from the cache. The build is a run with task: cache, or classification_cache for a
    classifier: `stillhouse run` watches, stops and resumes it, and stored outputs are never queried again.
    """
    loaded = load(session, file, overrides, push=push)
    loaded.spec.task = "classification_cache" if loaded.spec.task == "sequence_classification" else "cache"
    loaded.spec.cache.path = place or loaded.spec.cache.path
    loaded.spec.cache.mode = "write_through"
    said = f"builds {loaded.spec.cache.path}"
    run, code = submit(session, loaded, said, watch=watch, request_id=request_id)
    if watch and not code and not session.as_json:
        session.say(summary_text(loaded.spec.cache.path, _summary_of(run)))
    return code


@command(cache, name="list")
def list_caches(session: Session) -> None:
    """List the caches that runs of the trainer name, most recently used first."""
    from stillhouse.client.terminal.render import columns, state_name, time_text
    from stillhouse.client.trainer.run_lookup import run_id

    found = []
    rows = []
    for each in caches_of(session.trainer.runs()):
        run = each.last_run
        found.append({"path": each.path, "run": run_id(run.name), "use": each.use, "state": state_name(run)})
        rows.append((*found[-1].values(), time_text(run.create_time)))
    header = ("CACHE", "LAST RUN", "USE", "STATE", "CREATED")
    table = columns(rows, header, empty="No run has named a cache yet.")
    session.show({"caches": found}, table)


@command(cache)
@click.argument("what")
def info(session: Session, what: str) -> None:
    """Show what a cache holds: teachers, settings of queries, sequences, tokens, bytes per token.

    WHAT is a folder or shard on this machine, the caches/NAME of a build on the trainer, or the run that built it.
    """
    path = Path(what).expanduser()
    if path.exists():
        from stillhouse.protos.cache.reader import CacheReader
        from stillhouse.protos.cache.summary import summary

        contents = summary(CacheReader(path, ignore_broken=path.is_dir()))
    else:
        contents = _summary_of(_build_of(session, what))
    session.show({"cache": what} | contents, summary_text(what, contents))


@command(cache)
@click.argument("path", type=click.Path(path_type=Path))
def verify(session: Session, path: Path) -> int:
    """Check every byte and every value of the cache at PATH, on this machine.

    The exit code is 1 if a file is damaged; each damaged file is listed with its fault.
    """
    from stillhouse.protos.cache.reader import CacheReader
    from stillhouse.protos.errors import Reason, StillhouseError

    if not path.exists():
        raise StillhouseError(
            Reason.CACHE_NOT_FOUND,
            f"There is no cache at {path} on this machine. Files are verified where they lie: a run's cache is below "
            "the trainer's --data-dir, on its host.",
            resource=str(path),
        )
    reader = CacheReader(path, ignore_broken=True)
    bad = {each.path.name: each.error.message for each in reader.broken}
    sequences = 0
    for shard in reader.shards:
        try:
            sequences += reader.verify(shard)
        except StillhouseError as error:
            bad[shard.path.name] = error.message
    files = len(reader.shards) + len(reader.broken)
    counted = f"Intact: {files - len(bad)} of {files} files, with {sequences} sequences."
    document = {"files": files, "sequences": sequences, "damaged": bad}
    session.show(document, "\n".join([*bad.values(), counted]))
    return 1 if bad else 0


def _build_of(session: Session, what: str) -> RunHandle:
    """Returns the run `what`, or the last one that built the cache of this name."""
    from stillhouse.client.trainer.run_handle import RunHandle
    from stillhouse.protos.errors import Reason, StillhouseError

    if "/" not in what:
        return session.run(what)
    for run in session.trainer.runs():
        if run.effective_spec.task in CACHE_TASKS and run.spec.cache.path == what:
            return RunHandle(session.trainer, run.name)
    raise StillhouseError(
        Reason.CACHE_NOT_FOUND,
        f"There is no {what} on this machine, and no run of the trainer builds a cache of this name; "
        "`stillhouse cache list` shows those of its runs.",
        resource=what,
    )


def _summary_of(run: RunHandle) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        [path] = run.pull(SUMMARY, Path(directory))
        contents: dict[str, Any] = json.loads(path.read_bytes())
        return contents


def summary_text(what: str, contents: dict[str, Any]) -> str:
    """Formats the summary of a cache for people."""
    from stillhouse.client.terminal.render import size_text

    if not contents["kinds"]:
        return f"{what} holds no sequence yet."
    lines = [
        f"{what}: {contents['sequences']} sequences, {contents['tokens']} tokens, {size_text(contents['bytes'])}, "
        f"{contents['bytes_per_token']:.1f} bytes per token"
    ]
    for kind in contents["kinds"]:
        extras = [f"temperature {each:g}" for each in kind["temperatures"]]
        extras += ["entropy"] * kind["entropy"] + ["held-out text"] * kind["held_out"]
        extras += ["behind prompts of the teacher alone"] * kind["prompted"]
        extras += [f"{name} {value}" for name, value in (kind["sampling"] or {}).items()]
        adapter = f" with adapter {kind['adapter']}" if kind["adapter"] else ""
        lines += [
            f"  teacher {kind['model']}{adapter}",
            f"    top-{kind['top_k']}, {kind['logprob_dtype']}, {', '.join([kind['codec'], *extras])}",
            f"    {kind['sequences']} sequences, {kind['tokens']} tokens, {kind['bytes_per_token']:.1f} bytes per token",
            f"    teacher {kind['teacher_fingerprint'][:12]}  tokenizer {kind['tokenizer_fingerprint'][:12]}",
        ]
    lines += [f"  damaged: {each['why']}" for each in contents["broken"]]
    return "\n".join(lines)
