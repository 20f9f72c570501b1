"""`stillhouse teacher`: shows a teacher, its tokenizer and its adapters, and manages adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stillhouse.client.terminal.session import Session, command

if TYPE_CHECKING:
    from stillhouse.protos.stillhouse.v1.teacher_pb2 import GetTeacherInfoResponse


@click.group()
def teacher() -> None:
    """Query and manage a teacher service."""


@command(teacher, name="info")
def info(session: Session) -> None:
    """Show model, fingerprints, limits, capabilities and adapters."""
    from stillhouse.client.core.json_output import as_json
    from stillhouse.client.terminal.render import columns

    for number, service in enumerate(session.teachers):
        answer = service.info()
        if session.as_json:
            session.emit(as_json(answer))
            continue
        if len(session.teachers) > 1:
            session.say(("\n" if number else "") + service.target)
        session.say(columns(_facts(answer)))
        if answer.adapters:
            session.say("\n" + _adapters(answer))


def _adapters(answer: GetTeacherInfoResponse) -> str:
    from stillhouse.client.terminal.render import columns

    rows = [(each.name, str(each.rank), each.fingerprint[:12]) for each in answer.adapters]
    return columns(rows, header=("ADAPTER", "RANK", "FINGERPRINT"))


def _facts(answer: GetTeacherInfoResponse) -> Iterator[tuple[str, str]]:
    from stillhouse.client.core.json_output import enum_name
    from stillhouse.protos.stillhouse.v1.teacher_pb2 import Capability

    yield "model", answer.model
    if answer.revision:
        yield "revision", answer.revision
    yield "engine", answer.engine
    yield "type", answer.dtype + (f", quantised by {answer.quantization}" if answer.quantization else "")
    yield "vocabulary", f"{answer.tokenizer_size} tokens, {answer.vocab_size} with padding"
    yield "longest sequence", f"{answer.max_sequence_tokens} tokens"
    if answer.class_names:
        yield "classes", ", ".join(answer.class_names)
    else:
        yield "largest top_k", str(answer.max_top_k)
    yield (
        "in flight",
        f"{answer.max_inflight_sequences} sequences a call, {answer.max_prompts} prompts a call",
    )
    names = [enum_name(Capability.DESCRIPTOR, each) or "" for each in answer.capabilities]
    yield "adapters", f"{len(answer.adapters)} of {answer.max_adapters} loaded"
    yield "capabilities", ", ".join(name.lower() for name in names) or "none beyond top-k"
    yield "end tokens", ", ".join(map(str, answer.eos_token_ids))
    yield "model fingerprint", answer.model_fingerprint
    yield "tokenizer", answer.tokenizer_fingerprint
    yield "chat template", answer.chat_template_fingerprint or "none"
    yield "version", answer.service_version


@command(teacher, name="tokenizer")
@click.option(
    "--to", "directory", type=click.Path(path_type=Path), default=Path("tokenizer"), show_default=True
)
def tokenizer(session: Session, directory: Path) -> None:
    """Copy the tokenizer's files to this machine."""
    paths = session.teacher.save_tokenizer(directory)
    files = [str(path) for path in paths]
    session.show({"files": files}, "\n".join(files))


@command(teacher, name="adapters")
def adapters(session: Session) -> None:
    """List the loaded LoRA adapters."""
    from stillhouse.client.core.json_output import as_json

    answer = session.teacher.info()
    document = {"adapters": [as_json(each) for each in answer.adapters], "max_adapters": answer.max_adapters}
    in_use = f"{len(answer.adapters)} of {answer.max_adapters} slots in use"
    session.show(document, f"{_adapters(answer)}\n{in_use}".lstrip("\n"))


@command(teacher, name="load-adapter")
@click.argument("name")
@click.argument("path")
def load_adapter(session: Session, name: str, path: str) -> None:
    """Load the LoRA adapter in PATH under NAME.

    PATH is a directory on the teacher's host. A name never changes its weights: load step 120 as "run-7/120".
    """
    from stillhouse.client.core.json_output import as_json

    adapter = session.only_teacher.load_adapter(name, path)
    text = f"{adapter.name} loaded: rank {adapter.rank}, fingerprint {adapter.fingerprint[:12]}"
    session.show(as_json(adapter), text)


@command(teacher, name="unload-adapter")
@click.argument("name")
def unload_adapter(session: Session, name: str) -> None:
    """Unload the adapter NAME; calls that are using it finish first."""
    session.only_teacher.unload_adapter(name)
    session.show({"unloaded": name}, f"{name} unloaded")


@command(teacher, name="upload-adapter")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--load", "name", default="", metavar="NAME", help="Load it under this name afterwards.")
def upload_adapter(session: Session, directory: Path, name: str) -> None:
    """Copy a LoRA adapter from DIRECTORY to the teacher's host.

    Only adapter_config.json and adapter_model.safetensors are sent.
    """
    answer = session.only_teacher.upload_adapter(directory)
    if name:
        session.only_teacher.load_adapter(name, answer.path)
    document = {"path": answer.path, "fingerprint": answer.fingerprint, "loaded": name or None}
    session.show(document, f"{answer.path}{f' is loaded as {name}' if name else ''}")
