"""Text of a model, or of whoever asked it, as a terminal can be given it.

A terminal obeys some characters instead of showing them: text that has them could change what
was printed before, or what the keyboard does afterwards.
"""

from __future__ import annotations

_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\r\t"}
_PICTURES |= {0x7F: ord("\N{SYMBOL FOR DELETE}")}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), ord("\N{REPLACEMENT CHARACTER}"))


def printable(text: str) -> str:
    """The text with pictures of its control characters, as long as before.

    Ends of lines and tabs are kept.
    """
    return text.translate(_PICTURES)
