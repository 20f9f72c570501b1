"""Tokens with their distributions as JSON values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stillhouse.client.web.teachers.token_texts import TokenTexts
from stillhouse.protos.tensors.distributions import Distributions


def token_documents(
    texts: TokenTexts, token_ids: Sequence[int], rows: Distributions | None
) -> list[dict[str, Any]]:
    """The tokens with their log-probabilities, the likeliest ones in their places, and the log of all others' mass.

    A null is minus infinity. Without `rows` the tokens have none of these.
    """
    documents: list[dict[str, Any]] = [{"id": each, "text": texts.token(each).text} for each in token_ids]
    if rows is None:
        return documents
    own, tails, tops = _finite(rows.target_logprobs), _finite(rows.log_tail), _finite(rows.logprobs)
    for at, (document, ids) in enumerate(zip(documents, rows.token_ids.tolist(), strict=True)):
        document["logprob"] = own[at]
        document["top"] = [
            {"id": each, "text": texts.token(each).text, "logprob": logprob}
            for each, logprob in zip(ids, tops[at], strict=True)
        ]
        document["tail"] = tails[at]
    return documents


def _finite(values: Any) -> Any:
    found: np.ndarray[Any, Any] = np.asarray(values, np.float64)
    return np.where(np.isfinite(found), found, None).tolist()  # type: ignore[call-overload]
