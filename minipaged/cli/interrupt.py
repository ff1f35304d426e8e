"""Ctrl-C ends a run between two steps, so that nothing is left half done."""

from __future__ import annotations

import signal
from types import FrameType


class Interrupt:
    """While it is entered, the first Ctrl-C sets `asked`; a second one interrupts as usual."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._before)
