"""Small artifacts of runs that are JSON objects, read as they stand: no file is hashed for it."""

from __future__ import annotations

import json
from contextlib import aclosing
from typing import Any

from stillhouse.client.web.api.context import WebContext
from stillhouse.client.web.security.callers import Caller
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import run_pb2


async def read_json_artifact(
    context: WebContext, caller: Caller, run: str, path: str, *, limit: int
) -> dict[str, Any]:
    """The artifact `path` of the run of this id, of at most `limit` bytes.

    Raises StillhouseError: ARTIFACT_NOT_FOUND, CHECKPOINT_CORRUPT for another file than that, and those of the call.
    """
    message = run_pb2.DownloadArtifactRequest(name=f"runs/{run}", path=path)
    content = bytearray()
    async with aclosing(caller.stream(context.upstream.trainer, "DownloadArtifact", message)) as chunks:
        async for chunk in chunks:
            content += chunk.data
            if len(content) > limit:
                raise unreadable(path, f"has more than {limit} bytes")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise unreadable(path, "is not JSON") from error
    if not isinstance(document, dict):
        raise unreadable(path, "is not a JSON object")
    return document


def unreadable(path: str, problem: str) -> StillhouseError:
    """The error of a file that is another one than its name says."""
    return StillhouseError(
        Reason.CHECKPOINT_CORRUPT,
        f"The file {path} of the run {problem}. Download it as an artifact to look into it.",
    )
