"""Pages of lists: sizes within limits, and tokens that are bound to the filter of their request."""

from __future__ import annotations

from stillhouse.protos.errors import Reason, StillhouseError

DEFAULT_PAGE, MAX_PAGE = 50, 500


def bounded(field: str, value: int, default: int, most: int) -> int:
    """Clamps `value` to its limit; the default for 0. Raises StillhouseError(INVALID_REQUEST) if it is negative."""
    if value < 0:
        raise StillhouseError(
            Reason.INVALID_REQUEST, f"{field} is {value}; give at least 1, or 0 for {default}."
        )
    return min(value or default, most)


def page_size(value: int) -> int:
    """The size of a page that a request asks for. Raises StillhouseError(INVALID_REQUEST)."""
    return bounded("page_size", value, DEFAULT_PAGE, MAX_PAGE)


def page_token(number: int | None, filtered_by: str) -> str:
    """The token of the page that continues from `number`; empty without one."""
    return "" if number is None else f"{number}-{filtered_by}"


def read_page_token(token: str, filtered_by: str) -> int | None:
    """The number that a page continues from; None for the first. Raises StillhouseError(INVALID_REQUEST)."""
    if not token:
        return None
    number = token.partition("-")[0]
    if (
        not (number.isascii() and number.isdecimal())
        or len(number) > 18
        or token != page_token(int(number), filtered_by)
    ):
        raise StillhouseError(
            Reason.INVALID_REQUEST,
            f"page_token {token[:80]!r} does not belong to this request; repeat the request that returned it.",
        )
    return int(number)
