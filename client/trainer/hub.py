"""Uploads the files of a folder to a model hub in one commit, so that a broken upload leaves the repository as it was."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.client.core.errors import file_errors, usage_error
from stillhouse.protos.errors import Reason, StillhouseError, first_line
from stillhouse.protos.files.adapter import BASE, CONFIG, base_beside

CARD = "README.md"


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
) -> HubCommit:
    """Uploads `files` of `directory` to the model repository `repo_id`, which is made, `private` or not, if it does not exist.

    Whatever else lies in `directory` stays here; a single file may be `directory` itself.
    `license_id` is written into the card first. The hub is that of HF_ENDPOINT, the token that of HF_TOKEN, or of
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
    with _hub_errors(hub, repo_id, api.endpoint):
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.create_commit(
            repository.repo_id,
            operations=_additions(hub, files, directory, license_id),
            commit_message=message,
        )
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


def _additions(hub: Any, files: Sequence[Path], directory: Path, license_id: str | None) -> list[Any]:
    """The files by their paths below `directory`, the card with the licence, an adapter's base by its folder.

    The files themselves stay as they were pulled.
    """
    contents: dict[str, Path | bytes] = {
        path.name if path == directory else path.relative_to(directory).as_posix(): path
        for path in sorted(files)
    }
    for name, path in [*contents.items()]:
        if isinstance(path, Path) and path.name == CONFIG and base_beside(path.parent) is not None:
            # A pull names the base by its path on this machine, which is nobody else's.
            with file_errors("read", path):
                values = json.loads(path.read_bytes()) | {"base_model_name_or_path": BASE}
            contents[name] = json.dumps(values, indent=2).encode()
    if license_id:
        with file_errors("read", directory / CARD):
            card = hub.ModelCard((directory / CARD).read_text(encoding="utf-8") if CARD in contents else "")
        card.data["license"] = license_id
        contents[CARD] = str(card).encode()
    return [hub.CommitOperationAdd(name, content) for name, content in contents.items()]


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
        reason, remedy = {
            401: (Reason.UNAUTHENTICATED, "Set HF_TOKEN to a valid token."),
            403: (Reason.PERMISSION_DENIED, f"Give HF_TOKEN a token that may write to {repo_id}."),
            404: (Reason.NOT_FOUND, "Correct the owner's name, or give a token that may see it."),
        }.get(
            status,
            (Reason.SERVICE_UNREACHABLE, "Try again later; files that were uploaded are not sent again."),
        )
        raise StillhouseError(
            reason, f"The hub at {endpoint} refused {repo_id}: {first_line(error)} {remedy}"
        ) from error
    except ValueError as error:
        raise usage_error(
            f"The hub refuses {CARD}: {first_line(error)} Correct it in the directory."
        ) from error
    except Exception as error:
        if not _is_of_transport(error):
            raise
        raise StillhouseError(
            Reason.SERVICE_UNREACHABLE,
            f"The hub at {endpoint} was not reached: {first_line(error)}. Check HF_ENDPOINT and the network; the "
            "repository is as it was.",
        ) from error


def _is_of_transport(error: Exception) -> bool:
    """Returns True for a broken connection: the library has its HTTP client's own errors, another client by version."""
    names = {each.__name__ for each in type(error).__mro__}
    return isinstance(error, OSError) or bool(names & {"TransportError", "RequestException"})
