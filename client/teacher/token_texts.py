"""Text of each token id, from the tokenizer.json that a teacher sends; none of it is executed."""

from __future__ import annotations

from typing import Any

from stillhouse.protos.tokenizers.tokenizer_json import TokenizerJson, tokenizer_errors


class TokenTexts:
    """Bytes of every token of one tokenizer."""

    def __init__(self, tokenizer_json: bytes) -> None:
        """Raises StillhouseError (TOKENIZER_INVALID) for a file that does not describe a tokenizer."""
        with tokenizer_errors(
            "Token texts cannot be read from the teacher's tokenizer.json", "Request no logprobs."
        ):
            tokenizer = TokenizerJson(tokenizer_json)
            self._bytes = tokenizer.vocab_bytes()
            for token in tokenizer.added:
                self._bytes[token.id] = token.content.encode("utf-8", "replace")

    def text(self, token: int) -> str:
        """Returns the text of one token; an incomplete character becomes U+FFFD."""
        return self._bytes.get(token, b"").decode("utf-8", "replace")

    def as_json(self, token: int, logprob: float) -> dict[str, Any]:
        """Returns the token in OpenAI's format."""
        return {"token": self.text(token), "logprob": logprob, "bytes": list(self._bytes.get(token, b""))}
