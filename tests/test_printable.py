"""Nothing that a model wrote, or somebody asked it, is obeyed by a terminal."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from minipaged.visual.printable import printable

KEPT = "\n\r\t"


@given(st.text(st.characters(codec="utf-8") | st.characters(categories=["Cc"])))
def test_control_characters_are_shown(text):
    shown = printable(text)
    for before, after in zip(text, shown, strict=True):
        obeyed = unicodedata.category(before) == "Cc" and before not in KEPT
        assert (after != before) == obeyed
        assert after in KEPT or unicodedata.category(after) != "Cc"


def test_each_has_the_picture_of_its_name():
    assert printable("\x1b[2Ja\x07\x7f\x9b") == "␛[2Ja␇␡\N{REPLACEMENT CHARACTER}"
