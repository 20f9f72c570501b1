"""Static files in memory, below a path with their digest, so that browsers keep them for good."""

from __future__ import annotations

import hashlib
import posixpath
import re
from functools import cache
from pathlib import Path

from starlette.responses import Response

FOLDERS = ("own", "vendor")
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
CACHE_CONTROL = "public, max-age=31536000, immutable"
_ROOT = Path(__file__).parent
_IMPORT = re.compile(r'^import .* from "(\.[^"]+)";$', re.MULTILINE)


@cache
def contents() -> dict[str, bytes]:
    """Content by name, such as "own/app.css"."""
    return {
        path.relative_to(_ROOT).as_posix(): path.read_bytes()
        for folder in FOLDERS
        for path in sorted((_ROOT / folder).rglob("*"))
        if path.suffix in MEDIA_TYPES
    }


@cache
def digest() -> str:
    """Sixteen hexadecimal digits that change with any of the files."""
    total = hashlib.sha256()
    for name, content in contents().items():
        total.update(f"{name} {len(content)}\n".encode() + content)
    return total.hexdigest()[:16]


def url_of(name: str) -> str:
    """Path of a file on the server. Raises KeyError for a name that no file has."""
    contents()[name]
    return f"/static/{digest()}/{name}"


@cache
def imports_of(name: str) -> tuple[str, ...]:
    """Names of the modules that the module `name` imports, directly or not, so that a page asks for all at once."""
    found: dict[str, None] = {}
    waiting = [name]
    while waiting:
        importer = waiting.pop()
        for path in _IMPORT.findall(contents()[importer].decode()):
            imported = posixpath.normpath(posixpath.join(posixpath.dirname(importer), path))
            if imported not in found:
                found[imported] = None
                waiting.append(imported)
    return tuple(found)


def respond(given_digest: str, name: str) -> Response | None:
    """The file, to be kept by browsers; None if there is no such file of this digest."""
    content = contents().get(name)
    if content is None or given_digest != digest():
        return None
    media_type = MEDIA_TYPES["." + name.rpartition(".")[2]]
    return Response(content, media_type=media_type, headers={"cache-control": CACHE_CONTROL})
