"""Files from elsewhere: run files, cache shards and paths into run directories; each is read or refused, and nothing else happens."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from google.protobuf import json_format

from stillhouse.client.runfile.load import parse_run
from stillhouse.protos.cache.reader import CacheReader
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec
from stillhouse.student_trainer.config import proto
from stillhouse.student_trainer.runs.api.artifacts import is_artifact, open_below
from tests.fuzz.conftest import CANARY, SEED, scaled, show
from tests.fuzz.messages import arbitrary, structure
from tests.fuzz.values import STRINGS, some_string
from tests.protos.cache.test_format import EVERYTHING, PLAIN, sequence, write
from tests.student_trainer.config.specs import SMALLEST, spec_of

EXAMPLES = Path(__file__).parents[2] / "examples" / "runs"
SCRAPS = (
    *(
        "&a",
        "*a",
        "<<: *a",
        "!!python/object/apply:os.system [id]",
        "!!binary aGk=",
        "!x y",
        "? [a]",
        "- ",
        ": ",
    ),
    *(
        "{",
        "}",
        "[",
        "]",
        "'",
        '"',
        "|\n",
        ">\n",
        "#",
        "%YAML 9.9",
        "---",
        "...",
        "\t",
        "\r",
        "\x00",
        "\ufeff",
        "~",
    ),
    *("1e999", "0x1F", "0o7", "1_0", ".nan", "yes", "2001-01-01", "null", "&a [*a, *a]", "student: {}"),
)


def scrambled(text: str, rng: random.Random) -> str:
    """A run file with one to six faults, as a careless hand or a hostile one would make them."""
    lines = text.splitlines()
    for _ in range(rng.randrange(1, 7)):
        at = rng.randrange(len(lines) + 1)
        match rng.randrange(8):
            case 0:
                lines[at:at] = [rng.choice(SCRAPS)]
            case 1:
                lines[at:at] = rng.choices(lines, k=rng.randrange(1, 4)) if lines else []
            case 2 if at < len(lines):
                del lines[at]
            case 3 if at < len(lines):
                lines[at] = " " * rng.randrange(9) + lines[at].lstrip()
            case 4 if at < len(lines) and ":" in lines[at]:
                lines[at] = lines[at].split(":")[0] + ": " + rng.choice((*SCRAPS, *STRINGS))
            case 5 if at < len(lines) and lines[at]:
                cut = rng.randrange(len(lines[at]))
                lines[at] = lines[at][:cut] + rng.choice(SCRAPS) + lines[at][cut:]
            case 6:
                lines[at:at] = ["x: " + "[" * rng.choice((5, 900))]
            case _:
                lines[at:at] = [some_string(rng, ())]
    return "\n".join(lines)


def test_a_run_file_is_read_or_all_that_is_wrong_is_said() -> None:
    texts = [path.read_text() for path in sorted(EXAMPLES.glob("*.yaml"))]
    refused: Counter[str] = Counter()
    count = scaled(150, 3000)
    sentences: set[str] = set()
    for number in range(count):
        rng = random.Random(f"{SEED}/yaml/{number}")
        if rng.random() < 0.3:
            spec = json_format.MessageToDict(arbitrary(RunSpec, rng, ()), preserving_proto_field_name=True)
            text = json.dumps(spec, indent=1)  # which is YAML
        else:
            text = rng.choice(texts)
        data = scrambled(text, rng).encode("utf-8", "replace")
        if rng.random() < 0.1:
            data = data[: rng.randrange(len(data) + 1)] + rng.randbytes(3)
        try:
            proto.from_proto(parse_run(data, "run.yaml").spec)
        except StillhouseError as error:
            refused[error.reason] += 1
            sentences.add(error.message.splitlines()[0][-30:])
    show(
        "run files",
        iter([f"{count} cases, {refused.total()} refused, {len(sentences)} different first sentences"]),
    )
    assert set(refused) == {Reason.INVALID_SPEC}


def test_every_spec_is_checked_to_its_end() -> None:
    seen, count = set(), scaled(150, 3000)
    refused: Counter[str] = Counter()
    for number in range(count):
        rng = random.Random(f"{SEED}/spec/{number}")
        spec = spec_of(SMALLEST)
        spec.MergeFrom(arbitrary(RunSpec, rng, ()))
        seen.add(structure(spec))
        try:
            proto.to_proto(proto.from_proto(spec))
        except StillhouseError as error:
            refused[error.reason] += 1
    show("specs", iter([f"{count} cases, {len(seen)} structures, {refused.total()} refused"]))
    assert set(refused) == {Reason.INVALID_SPEC}


@pytest.mark.faults(row=11)
def test_a_shard_is_read_as_it_was_written_or_refused(tmp_path: Path) -> None:
    shards = [write(tmp_path / name, meta).read_bytes() for name, meta in (("a", PLAIN), ("b", EVERYTHING))]
    path, count = tmp_path / "hostile.parquet", scaled(150, 4000)
    refused: Counter[str] = Counter()
    sentences: set[str] = set()
    before = pa.total_allocated_bytes()
    for number in range(count):
        rng = random.Random(f"{SEED}/shard/{number}")
        which = rng.randrange(2)
        data = bytearray(shards[which])
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data) - 4) if rng.random() < 0.5 else len(data) - 1 - rng.randrange(3000)
            at = max(0, at)
            match rng.randrange(5):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    del data[at : at + rng.randrange(1, 50)]
                case 2:
                    data[at:at] = rng.randbytes(rng.randrange(1, 9))
                case 3:
                    data[at : at + 5] = b"\xff\xff\xff\xff\x0f"
                case _:
                    other = shards[1 - which]
                    data[at:] = other[at:]
            if len(data) < 8:
                break
        path.write_bytes(bytes(data))
        asked = (PLAIN, EVERYTHING)[which]
        try:
            reader = CacheReader(path)
            for shard in reader.shards:
                reader.verify(shard)
            for each in range(5):
                reader.get(asked.key(sequence(each), 3), asked)
            reader.close()
        except StillhouseError as error:
            refused[error.reason] += 1
            sentences.add(error.message)
    show("cache shards", iter([f"{count} cases, {refused.total()} refused"]))
    assert refused.total() > count // 2
    assert set(refused) == {Reason.CACHE_INVALID}
    assert not any("\n" in each for each in sentences)
    assert pa.total_allocated_bytes() - before < 64 * 2**20


@pytest.mark.faults(row=14)
def test_no_path_leaves_the_run(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "aaaaaaaaaaaa"
    (run / "exports" / "deep").mkdir(parents=True)
    (run / "final").mkdir()
    (run / "final" / "model").write_bytes(b"fine")
    (run / "spec.json").write_bytes(b"fine")
    (tmp_path / "canary").write_bytes(CANARY)
    (run / "exports" / "link").symlink_to(tmp_path / "canary")
    (run / "exports" / "up").symlink_to("../../..")
    (run / "exports" / "deep" / "self").symlink_to(".")
    parts = (
        "..",
        ".",
        "",
        "final",
        "model",
        "exports",
        "link",
        "up",
        "deep",
        "self",
        "canary",
        "spec.json",
        "runs",
    )
    opened, count = 0, scaled(3000, 12_000)
    refused: Counter[str] = Counter()
    for number in range(count):
        rng = random.Random(f"{SEED}/path/{number}")
        pieces = [rng.choice(parts) for _ in range(rng.randrange(1, 7))]
        if rng.random() < 0.2:
            pieces.insert(rng.randrange(len(pieces) + 1), some_string(rng, ()))
        path = rng.choice(("", "", "", "/", str(tmp_path) + "/")) + "/".join(pieces)
        is_artifact(path)
        try:
            with open_below(run, path) as file:
                opened += 1
                assert file.read() == b"fine", path
        except StillhouseError as error:
            refused[error.reason] += 1
    show("paths", iter([f"{count} cases, {opened} of them files of the run"]))
    assert opened > 0
    assert set(refused) == {Reason.INVALID_REQUEST, Reason.ARTIFACT_NOT_FOUND}
