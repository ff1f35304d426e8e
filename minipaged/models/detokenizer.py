"""From a growing list of token ids to text, piece by piece.

Owns the rule for when a piece is final: a character may be spread over several tokens, and
is held back until its last byte has come.
"""

from __future__ import annotations

from minipaged.models.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
LONGEST_WAIT = 64  # tokens; a character has 4 bytes, so nothing legible takes this long


class IncrementalDetokenizer:
    """The pieces it returns, put together, are what decoding all tokens at once would give.

    Each token costs two decodings of a short window: the last final piece, which gives the
    decoder its context, and the tokens after it.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._num_context_tokens = 0  # tokens of the window whose text was returned before
        self._num_returned = 0  # characters of the window's text that were returned

    def append(self, token_id: int) -> str:
        """Add a token; returns the text that has become final, which may be none."""
        self._window.append(token_id)
        text = self._decode(self._window)
        # Only a last, incomplete character can still change; it shows as a replacement sign.
        incomplete = text.endswith(REPLACEMENT) and len(self._window) < LONGEST_WAIT
        end = max(self._num_returned, len(text) - incomplete)
        new = text[self._num_returned : end]
        self._num_returned = end
        if not incomplete:
            self._window = self._window[self._num_context_tokens :]
            self._num_context_tokens = len(self._window)
            self._num_returned = len(self._decode(self._window))
        return new

    def finish(self) -> str:
        """The text that was held back, now that no token will follow."""
        text = self._decode(self._window)
        new = text[self._num_returned :]
        self._num_returned = len(text)
        return new

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)
