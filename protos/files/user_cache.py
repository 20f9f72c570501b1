"""The user's cache directory: what lies there saves time alone, and may be deleted at any moment."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache(folder: str) -> Path:
    """A folder of this package in the cache directory, which need not exist."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(root), "stillhouse", folder)  # noqa: PTH111 - Path's own fails without a home
