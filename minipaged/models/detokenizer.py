"""From a growing list of token ids to text, piece by piece.

Owns the rule for when a piece is final: a character may be spread over several tokens, and
is held back until its last byte has come.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from minipaged.models.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
LONGEST_WAIT = 64  # tokens; a character has 4 bytes, so nothing legible takes this long
LONGEST_CHARACTER = 4  # bytes
PROMPT_CONTEXT = 8  # tokens of the prompt that the first piece is decoded with


class IncrementalDetokenizer:
    """The pieces it returns, put together, are what prompt and output spell behind the prompt.

    Each token costs two decodings of a short window: the last final piece, which gives the
    decoder its context, and the tokens after it.  The context matters: decoders of the
    SentencePiece kind drop the space that a text begins with, so that the output's first
    word needs the end of the prompt in front of it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window = list(prompt_token_ids[-PROMPT_CONTEXT:])
        for first in range(min(LONGEST_CHARACTER, len(self._window))):
            # Bytes behind half a character are not taken for characters either.
            if not self._decode(self._window[first:]).startswith(REPLACEMENT):
                self._window = self._window[first:]
                break
        self._num_context_tokens = len(self._window)  # of the window: their text was returned
        # Characters of the window's text that were returned.
        self._num_returned = len(self._decode(self._window).rstrip(REPLACEMENT))

    def fork(self) -> IncrementalDetokenizer:
        """A second one that stands where this one does."""
        child = copy.copy(self)
        child._window = self._window.copy()
        return child

    def append(self, token_id: int) -> str:
        """Add a token; returns the text that has become final, which may be none."""
        self._window.append(token_id)
        text = self._decode(self._window)
        # Only a last, incomplete character can still change.  It shows as replacement signs:
        # one, or one for each of its bytes, as the decoder likes.
        waiting = len(self._window) - self._num_context_tokens < LONGEST_WAIT
        end = len(text.rstrip(REPLACEMENT)) if waiting else len(text)
        new = text[self._num_returned : end]
        self._num_returned = max(self._num_returned, end)
        # A piece without text, such as a special token, is no context for the next one.
        if self._num_returned == len(text) and (new or not waiting):
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
