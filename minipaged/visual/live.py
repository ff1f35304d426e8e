"""The text of several requests as it streams, with one line about the engine below it.

On a terminal the outputs grow side by side in place; elsewhere every finished line is
printed once, behind the name of its request, so that a log stays readable.
"""

from __future__ import annotations

import time
from collections import defaultdict
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from minipaged.engine.trace import StepRecord

LINES_SHOWN = 4


class StreamView:
    """An observer of the engine; use it as a context manager around the run."""

    def __init__(self, console: Console, names: dict[str, str]) -> None:
        self.console = console
        self.names = names  # of each request, in the order to show them
        self._text: dict[str, str] = defaultdict(str)
        self._printed: dict[str, int] = defaultdict(int)
        self._num_tokens = 0
        self._start = time.perf_counter()
        self._status = "waiting for the first token"
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> StreamView:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.console.is_terminal:
            self._live.stop()
            for request_id, text in self._text.items():
                self._print(request_id, text)
        else:
            for request_id in self._text:
                self._print_lines(request_id, whole=True)
        self.console.print(self._status, style="dim", highlight=False)

    def __call__(self, record: StepRecord) -> None:
        self._num_tokens += len(record.new_text)
        for request_id, new in record.new_text.items():
            self._text[request_id] += new
        self._status = self._describe(record)
        if self.console.is_terminal:
            self._live.update(self._render(), refresh=True)
            return
        for request_id in record.new_text:
            self._print_lines(request_id, whole=request_id in record.finished)

    def _describe(self, record: StepRecord) -> str:
        rate = self._num_tokens / max(1e-9, time.perf_counter() - self._start)
        running = len(record.running) - len(record.finished)
        return (
            f"{rate:7.1f} tokens/s   {running} running   {len(record.waiting)} waiting   "
            f"{record.num_preemptions} preempted   "
            f"{record.num_used_blocks}/{record.num_blocks} blocks used"
        )

    def _render(self) -> Group:
        rows = []
        for request_id, name in self.names.items():
            tail = self._text[request_id].splitlines()[-LINES_SHOWN:]
            rows += [Text(name, style="bold"), Text("\n".join(tail) or "…")]
        return Group(*rows, Text(self._status, style="dim"))

    def _print(self, request_id: str, text: str) -> None:
        self.console.print(Text(self.names[request_id], style="bold"))
        self.console.print(Text(text + "\n"))

    def _print_lines(self, request_id: str, whole: bool) -> None:
        """Print the lines of an output that are complete, or all of it."""
        text = self._text[request_id]
        end = len(text) if whole else text.rfind("\n") + 1
        for line in text[self._printed[request_id] : end].splitlines():
            self.console.print(Text(f"{self.names[request_id]} | {line}"), soft_wrap=True)
        self._printed[request_id] = max(end, self._printed[request_id])
