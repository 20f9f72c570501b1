"""The reason for which a completion, or one field of it, cannot be parsed."""

from __future__ import annotations


class ParseProblem(Exception):  # noqa: N818 - text of a model that is not as wanted is no error of the program
    """A text that does not hold what is looked for; its message names the place."""
