"""Uploads the files of a folder to a model hub in one commit, so that a broken upload leaves the repository as it was."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.client.core.errors import file_error, file_errors, usage_error
from stillhouse.protos.errors import Reason, StillhouseError, first_line
from stillhouse.protos.files.adapter import BASE, CONFIG, base_beside

CARD = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
"""OWNER/NAME, or the name of a model of the hub's first years."""
_SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/[0-9a-f]+/?$")
"""The end of a path in the cache of the hub's library."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HubCommit:
    """A commit on a hub."""

    url: str
    repo_id: str
    is_private: bool


def push_files(
    files: Sequence[Path],
    directory: Path,
    repo_id: str,
    *,
    private: bool,
    message: str,
    license_id: str | None = None,
    base_model: str | None = None,
) -> HubCommit:
    """Uploads `files` of `directory` to the model repository `repo_id`, which is made, `private` or not, if it does not exist.

    Whatever else lies in `directory` stays here; a single file may be `directory` itself.
    `license_id` is written into the card first, and `base_model` names an adapter's base on the hub. The hub is that of HF_ENDPOINT, the token that of HF_TOKEN, or of
    `hf auth login`. Raises StillhouseError.
    """
    hub = _library()
    token = hub.get_token()
    if not token:
        raise StillhouseError(
            Reason.UNAUTHENTICATED,
            "There is no token for the hub. Set HF_TOKEN to one that may write, or run `hf auth login`.",
        )
    api = hub.HfApi(token=token)
    # Before the repository is made: what is wrong here leaves nothing there.
    operations = _additions(hub, files, directory, license_id, base_model)
    with _hub_errors(hub, repo_id, api.endpoint):
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.create_commit(repository.repo_id, operations=operations, commit_message=message)
        found = api.model_info(repository.repo_id)
    return HubCommit(url=commit.commit_url, repo_id=repository.repo_id, is_private=bool(found.private))


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise usage_error(
            "`run push` needs huggingface_hub, which is not installed here: pip install huggingface_hub."
        ) from error
    return huggingface_hub


def _additions(
    hub: Any, files: Sequence[Path], directory: Path, license_id: str | None, base_model: str | None
) -> list[Any]:
    """The files by their paths below `directory`, the card with the licence, an adapter's base by its folder or hub id.

    The files themselves stay as they were pulled. Raises StillhouseError for a file that cannot be read, or a base that
    only another machine's path names.
    """
    contents: dict[str, Path | bytes] = {
        path.name if path == directory else path.relative_to(directory).as_posix(): path
        for path in sorted(files)
    }
    for name, path in [*contents.items()]:
        if isinstance(path, Path) and path.name == CONFIG:
            contents[name] = _with_base(path, base_model)
    if license_id:
        contents[CARD] = _with_license(hub, directory / CARD if CARD in contents else None, license_id)
    for content in contents.values():
        if isinstance(content, Path):
            with file_errors("read", content), content.open("rb"):
                pass  # the library has one error for all that it cannot read
    return [hub.CommitOperationAdd(name, content) for name, content in contents.items()]


def _with_base(path: Path, base_model: str | None) -> bytes:
    """The configuration of an adapter with the name of its base that a reader of the hub can follow."""
    with file_errors("read", path):
        content = path.read_bytes()
    try:
        values = json.loads(content)
        named = str(values["base_model_name_or_path"] or "")
    except (ValueError, TypeError, KeyError) as error:
        raise usage_error(
            f"{path} is no configuration of an adapter ({error}). Pull the run into another directory."
        ) from error
    if base_beside(path.parent) is not None:
        named = BASE  # a pull names it by its path on this machine, which is nobody else's
    elif base_model is not None:
        named = base_model
    elif cached := _SNAPSHOT.search(named):
        named = cached[1].replace("--", "/")
    elif not _HUB_ID.fullmatch(named):
        raise usage_error(
            f"{path} names the adapter's base {named!r}, a path of another machine, so nobody could load the adapter from the "
            "hub. Name the base there with --base-model OWNER/NAME."
        )
    return json.dumps(values | {"base_model_name_or_path": named}, indent=2).encode()


def _with_license(hub: Any, path: Path | None, license_id: str) -> bytes:
    """The model card, a new one without `path`, with a licence."""
    text = ""
    if path is not None:
        with file_errors("read", path):
            text = path.read_bytes().decode(errors="replace")
    try:
        card = hub.ModelCard(text)
    except Exception as error:  # of the YAML at its top, whose library has its own errors
        raise usage_error(
            f"{path} is no model card: {first_line(error)} Correct it, or leave --license out."
        ) from error
    card.data["license"] = license_id
    return str(card).encode()


@contextmanager
def _hub_errors(hub: Any, repo_id: str, endpoint: str) -> Iterator[None]:
    """Raises what the hub and its library raise as StillhouseError, with a remedy."""
    errors = hub.errors
    try:
        yield
    except errors.HFValidationError as error:
        raise usage_error(
            f"{repo_id!r} is no name of a repository: {first_line(error)} Give OWNER/NAME."
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise usage_error("HF_HUB_OFFLINE is set, so that nothing reaches the hub. Unset it.") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        later = Reason.SERVICE_UNREACHABLE, "Try again later; files that were uploaded are not sent again."
        refused = Reason.INVALID_REQUEST, "Correct what it names; the repository is as it was."
        reason, remedy = {
            401: (Reason.UNAUTHENTICATED, "Set HF_TOKEN to a valid token."),
            403: (Reason.PERMISSION_DENIED, f"Give HF_TOKEN a token that may write to {repo_id}."),
            404: (Reason.NOT_FOUND, "Correct the owner's name, or give a token that may see it."),
            408: later,
            409: later,
            429: later,
        }.get(status, refused if 400 <= status < 500 else later)
        raise StillhouseError(
            reason, f"The hub at {endpoint} refused {repo_id}: {first_line(error)} {remedy}"
        ) from error
    except ValueError as error:
        # The library names the card; all else that it refuses is told by itself.
        if CARD in str(error):
            sentence = f"The hub refuses {CARD}: {first_line(error)} Correct it in the directory."
        else:
            sentence = f"The files cannot be sent to {repo_id}: {first_line(error)} Correct what it names."
        raise usage_error(sentence) from error
    except OSError as error:
        if error.filename is None:
            raise _unreached(endpoint, error) from error
        raise file_error("read", error.filename, error) from error
    except Exception as error:
        if not _is_of_transport(error):
            raise
        raise _unreached(endpoint, error) from error


def _unreached(endpoint: str, error: Exception) -> StillhouseError:
    return StillhouseError(
        Reason.SERVICE_UNREACHABLE,
        f"The hub at {endpoint} was not reached: {first_line(error)}. Check HF_ENDPOINT and the network; the "
        "repository is as it was.",
    )


def _is_of_transport(error: Exception) -> bool:
    """Returns True for a broken connection: the library has its HTTP client's own errors, another client by version."""
    return bool({each.__name__ for each in type(error).__mro__} & {"TransportError", "RequestException"})
