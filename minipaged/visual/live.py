"""The text of several requests as it streams, with one line about the engine above it.

On a terminal the outputs grow side by side in place; elsewhere every finished line is
printed once, behind the name of its request, so that a log stays readable.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from minipaged.engine.outputs import RequestOutput
from minipaged.engine.trace import StepRecord
from minipaged.visual.printable import printable

LINES_SHOWN = 4


class StreamView:
    """A context manager around the run: an observer of the engine that is also shown the outputs.

    names: of each request, in the order to show them.
    ranked: requests whose outputs can still change places or be replaced while they grow, as
        beams do; a log shows these when they are done.
    """

    def __init__(self, console: Console, names: dict[str, str], ranked: Iterable[str] = ()) -> None:
        self.console = console
        self.names = names
        self._ranked = frozenset(ranked)
        self._outputs: dict[str, RequestOutput] = {}
        self._printed: dict[tuple[str, int], int] = defaultdict(int)
        self._num_tokens = 0
        self._start = time.perf_counter()
        self._status = "waiting for the first token"
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> StreamView:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.console.is_terminal:
            self._live.stop()
        for output in sorted(
            self._outputs.values(), key=lambda o: list(self.names).index(o.request_id)
        ):
            if self.console.is_terminal:
                self._print(output)
            else:
                self._print_lines(output, whole=True)
        self.console.print(self._status, style="dim", highlight=False)

    def __call__(self, record: StepRecord) -> None:
        self._num_tokens += len(record.new_text)
        self._status = self._describe(record)

    def show(self, outputs: Iterable[RequestOutput]) -> None:
        """The requests that got a token, as they stand now."""
        for output in outputs:
            self._outputs[output.request_id] = output
            if not self.console.is_terminal:
                self._print_lines(output, whole=output.finished)
        if self.console.is_terminal:
            self._live.update(self._render(), refresh=True)

    def _describe(self, record: StepRecord) -> str:
        rate = self._num_tokens / max(1e-9, time.perf_counter() - self._start)
        running = len(record.running) - len(record.finished)
        swapped = f" ({record.num_swaps} swapped)" if record.num_swaps else ""
        shared = f", {record.num_shared_blocks} shared" if record.num_shared_blocks else ""
        return (
            f"{rate:7.1f} tokens/s   {running} running   {len(record.waiting)} waiting   "
            f"{record.num_preemptions} preempted{swapped}   "
            f"{record.num_used_blocks}/{record.num_blocks} blocks used{shared}"
        )

    def _name(self, output: RequestOutput, index: int) -> str:
        """Of one output: with its index where there are several."""
        name = self.names[output.request_id]
        if len(output.outputs) == 1:
            return name
        number, _, prompt = name.partition(" ")
        return f"{number.removesuffix(']')}.{index}] {prompt}"

    def _render(self) -> Group:
        rows = []
        for request_id, name in self.names.items():
            output = self._outputs.get(request_id)
            if output is None:
                rows += [Text(name, style="bold"), Text("…")]
                continue
            for completion in output.outputs:
                tail = printable(completion.text).splitlines()[-LINES_SHOWN:]
                rows.append(Text(self._name(output, completion.index), style="bold"))
                rows.append(Text("\n".join(tail) or "…"))
        # Above the texts: what does not fit on the screen is cut off below.
        return Group(Text(self._status, style="dim"), *rows)

    def _print(self, output: RequestOutput) -> None:
        for completion in output.outputs:
            self.console.print(Text(self._name(output, completion.index), style="bold"))
            self.console.print(Text(printable(completion.text) + "\n"))

    def _print_lines(self, output: RequestOutput, whole: bool) -> None:
        """Print the lines of the outputs that are complete, or all of them."""
        if output.request_id in self._ranked and not whole:
            return
        for completion in output.outputs:
            name, text = self._name(output, completion.index), completion.text
            key = output.request_id, completion.index
            done = whole or completion.finish_reason is not None
            end = len(text) if done else text.rfind("\n") + 1
            for line in printable(text[self._printed[key] : end]).splitlines():
                self.console.print(Text(f"{name} | {line}"), soft_wrap=True)
            self._printed[key] = max(end, self._printed[key])
