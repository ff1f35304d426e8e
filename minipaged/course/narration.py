"""What a test did, told as code and state, so that a failure shows the way that led to it.

Hypothesis runs the smallest failing example last, and every example begins a new story: what is
left is the shortest sequence of calls that fails.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

WIDTH = 44  # at which the state is written behind a call


class Story:
    """The lines of the running example."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._open = ""

    def begin(self, title: str = "") -> None:
        """A new example, for which all that was told is forgotten."""
        self.lines = [f"# {title}"] if title else []
        self._open = ""

    def tell(self, code: str, state: str = "") -> None:
        """One line: what is done, and the state after it."""
        self.lines.append(f"{code:{WIDTH}}  # {state}" if state else code)

    def start_call(self, code: str) -> None:
        """A call that may not come back."""
        self._open = code

    def end_call(self, outcome: str, state: str) -> None:
        """The call came back, or raised."""
        code, self._open = self._open, ""
        self.tell(f"{code}{outcome}", state)

    def text(self) -> str:
        """All lines; the last may be a call that has not come back."""
        unfinished = [f"{self._open:{WIDTH}}  # did not come back"] if self._open else []
        return "\n".join([*self.lines, *unfinished])


story = Story()
"""Of the test that runs; there is one at a time."""


class Narrated:
    """Stands before an object: every call of it is written down, with the state after it.

    name: of the object in the story.
    state: describes it in the notation of the paper, as in "table A: [7, 1]   free: {0, 2}".
    made_by: the code that made it.
    quiet: methods that only answer a question, and are not written down.
    """

    def __init__(
        self,
        target: Any,
        name: str,
        state: Callable[[Any], str],
        made_by: str = "",
        quiet: Collection[str] = (),
    ) -> None:
        self._target, self._name, self._state, self._quiet = target, name, state, quiet
        if made_by:
            story.tell(f"{name} = {made_by}", self._describe())

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(self._target, attribute)
        if not callable(value) or attribute in self._quiet:
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            parts = [repr(a) for a in args] + [f"{k}={v!r}" for k, v in kwargs.items()]
            story.start_call(f"{self._name}.{attribute}({', '.join(parts)})")
            try:
                result = value(*args, **kwargs)
            except Exception as error:
                story.end_call(f"  -> {type(error).__name__}", self._describe())
                raise
            story.end_call("" if result is None else f"  -> {result!r}", self._describe())
            return result

        return call

    def _describe(self) -> str:
        try:
            return self._state(self._target)
        except Exception as error:
            return f"its state cannot be told: {error!r}"
