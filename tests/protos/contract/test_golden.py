"""Messages of version 1 still decode to the same content, and encode to the same bytes."""

import pytest
from google.protobuf import descriptor_pool, json_format
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.unknown_fields import UnknownFieldSet

from tests.protos.contract import golden

GOLDEN = golden.read()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes_decode_and_encode_again(name: str) -> None:
    message_class = GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(name.partition("/")[0]))
    data = bytes.fromhex(GOLDEN[name]["hex"])
    message = message_class.FromString(data)
    assert message == json_format.ParseDict(GOLDEN[name]["json"], message_class())
    assert message.SerializeToString(deterministic=True) == data
    assert len(UnknownFieldSet(message)) == 0


def test_every_message_and_alternative_has_golden_bytes() -> None:
    missing = golden.entries().keys() - GOLDEN.keys()
    assert not missing, (
        "run `python -m tests.protos.contract.golden` and commit tests/protos/contract/golden_v1.json"
    )
