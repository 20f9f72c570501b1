"""The user's cache directory: what lies there saves time alone, and may be deleted at any moment."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache(folder: str) -> Path:
    """A folder of this package in the cache directory, which need not exist; never one below the working directory."""
    roots = (os.path.expanduser(each) for each in (os.environ.get("XDG_CACHE_HOME", ""), "~/.cache"))  # noqa: PTH111 - Path's own fails without a home
    # A user without a home has "/", as in most containers.
    return Path(next(filter(os.path.isabs, roots), "/.cache"), "stillhouse", folder)
