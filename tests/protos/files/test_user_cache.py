"""The user's cache directory with all kinds of environments."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.protos.files.user_cache import user_cache


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"XDG_CACHE_HOME": "/given", "HOME": "/home/me"}, "/given/stillhouse/scans"),
        ({"XDG_CACHE_HOME": "~/given", "HOME": "/home/me"}, "/home/me/given/stillhouse/scans"),
        ({"XDG_CACHE_HOME": "", "HOME": "/home/me"}, "/home/me/.cache/stillhouse/scans"),
        ({"XDG_CACHE_HOME": "given", "HOME": "/home/me"}, "/home/me/.cache/stillhouse/scans"),
        ({"XDG_CACHE_HOME": "given", "HOME": "here"}, "/.cache/stillhouse/scans"),
    ],
)
def test_it_is_never_below_the_working_directory(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert user_cache("scans") == Path(expected)
