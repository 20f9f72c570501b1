"""Handler of the page of what a run learns: held-out text, each token coloured by the KL between teacher and student."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from stillhouse.client.web.api.context import WebContext
from stillhouse.client.web.api.messages import check_names
from stillhouse.client.web.pages.rendering import render
from stillhouse.client.web.pages.run_summary import RunSummary
from stillhouse.client.web.pages.views import frame_of, get_run

MEASURES = (
    ("kl", "KL(teacher ‖ student)"),
    ("student", "Student's surprise, -log q of the text's token"),
    ("teacher", "Teacher's surprise, -log p of the text's token"),
)
"""Values of a token that colour it, and their names."""
LEVELS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
"""Bounds of the colours, in nats; a value below the first has none."""


async def show_tokens(context: WebContext, request: Request) -> Response:
    """The page of the examples of a run's evaluations."""
    check_names(request.query_params, ())
    run = await get_run(context, context.callers.of(request), request.path_params["run"])
    return render(
        "tokens.html",
        **frame_of(context, request),
        summary=RunSummary(run=run),
        run=run,
        measures=MEASURES,
        levels=list(zip((0.0, *LEVELS), (*LEVELS, None), strict=True)),
    )
