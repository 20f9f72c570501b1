"""What each token id stands for, out of the tokenizer.json that a teacher sends; nothing in it is run."""

from __future__ import annotations

from typing import Any

from stillhouse.protos.tokenizers.tokenizer_json import TokenizerJson, tokenizer_errors


class TokenTexts:
    """The bytes of every token of one tokenizer."""

    def __init__(self, tokenizer_json: bytes) -> None:
        """Raises StillhouseError (TOKENIZER_INVALID) for what is no description of a tokenizer."""
        with tokenizer_errors(
            "Token texts cannot be read from the teacher's tokenizer.json", "Request no logprobs."
        ):
            tokenizer = TokenizerJson(tokenizer_json)
            self._bytes = tokenizer.vocab_bytes()
            for token in tokenizer.added:
                self._bytes[token.id] = token.content.encode("utf-8", "replace")

    def text(self, token: int) -> str:
        """The text of one token; a part of a character is shown as U+FFFD."""
        return self._bytes.get(token, b"").decode("utf-8", "replace")

    def as_json(self, token: int, logprob: float) -> dict[str, Any]:
        """The token as OpenAI's format has it."""
        return {"token": self.text(token), "logprob": logprob, "bytes": list(self._bytes.get(token, b""))}
