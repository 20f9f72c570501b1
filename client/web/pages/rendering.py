"""Renders templates as HTML documents; every value is escaped."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import Response

from stillhouse.client.web.pages import text
from stillhouse.client.web.static import files

MEDIA_TYPE = "text/html; charset=utf-8"


@cache
def _environment() -> Environment:
    result = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    result.filters.update(number=text.number, age=text.age, iso=text.iso, moment=text.moment, size=text.size)
    result.filters.update(dataset=text.dataset_name, shorter=text.shorter, code=text.with_code)
    result.globals.update(static=files.url_of, module=_module, between=text.between)
    return result


def _module(name: str) -> Markup:
    """The script element of a module, behind links that load what it imports at the same time."""
    links = "".join(
        f'<link rel="modulepreload" href="{files.url_of(each)}">\n' for each in files.imports_of(name)
    )
    return Markup(f'{links}<script type="module" src="{files.url_of(name)}"></script>')  # noqa: S704 - names of files


def render(template: str, status: int = 200, /, **values: Any) -> Response:
    """The page that `template` makes of `values`; text that is no Unicode is replaced."""
    page = _environment().get_template(template).render(values)
    return Response(page.encode("utf-8", "replace"), status, media_type=MEDIA_TYPE)
