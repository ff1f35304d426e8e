"""The command line.  Every command is a thin layer over the Python interface.

Errors that are the input's fault are one sentence on standard error and exit code 2.
"""

from __future__ import annotations

import gc
import io
import sys

import typer

from minipaged.cli import bench_machine, bench_parallel, bench_serve  # noqa: F401  (for bench)
from minipaged.cli.bench import bench
from minipaged.cli.course import course_app
from minipaged.cli.generate import INTERRUPTED, chat, complain, generate
from minipaged.cli.lesson import lesson_app
from minipaged.cli.serve import serve
from minipaged.cli.simulate import reproduce, simulate, tune_block_size
from minipaged.errors import MinipagedError

app = typer.Typer(
    help="PagedAttention, readable: generate text and watch the block map.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command()(chat)
app.command()(serve)
app.command()(simulate)
app.command()(reproduce)
app.command("tune-block-size")(tune_block_size)
app.add_typer(bench, name="bench")
app.add_typer(lesson_app, name="lesson")
app.add_typer(course_app, name="course")


def main() -> None:
    """Entry point of the command."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that is not UTF-8 shows "?" for a bar
        sys.stdout.reconfigure(errors="replace")
    try:
        app()
    except MinipagedError as error:
        complain(str(error))
        raise SystemExit(2) from None
    except NotImplementedError as error:  # a task of a lesson that is run on
        complain(f"{error}; write it, or leave its lesson out of --lessons")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    finally:
        gc.freeze()  # else Python looks through all of torch for garbage before it ends: 0.4 s
