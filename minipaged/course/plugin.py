"""pytest for learners: `pytest --lesson 3` tests one's own modules, and says which task failed how.

A plain `pytest` tests the reference, and this plugin does nothing then.  With --lesson the
learner's files take the place of the package's before anything is imported, only the tests of
that lesson run, and a failure is told in a few lines: the task, the state in the paper's
notation, the shortest sequence of calls that fails, the learner's own lines in the traceback.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from minipaged.course.lesson import Lesson, LessonError, Task, find_lesson, find_task
from minipaged.course.narration import story
from minipaged.course.stubs import STILL_OPEN
from minipaged.course.substitution import own_files, substitute, substituted
from minipaged.errors import OutOfBlocksError


class TaskTimeoutError(BaseException):
    """A test did not come to an end; no Exception, so that nothing takes it for an example."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of a learner, and those that the grader adds."""
    group = parser.getgroup("lesson", "lessons: test your own modules")
    group.addoption("--lesson", type=int, metavar="N", help="test your files of lesson N")
    group.addoption("--task", metavar="N.M", help="of those, the tests of one task")
    group.addoption("--own", type=Path, metavar="DIR", help="where your files are, if elsewhere")
    group.addoption("--task-seconds", type=int, metavar="S", help="of a test, if less than its own")
    group.addoption(
        "--also", action="append", default=[], metavar="FILE=PATH", help="replace this file, too"
    )
    group.addoption("--lesson-report", type=Path, metavar="FILE", help="write the outcomes there")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config, args: list[str]) -> None:
    """Put the learner's files in place before anything else is imported."""
    options = early_config.known_args_namespace
    if options.lesson is None and options.task is None:
        return
    try:
        if options.task is not None:
            lesson, _ = find_task(options.task)
        else:
            lesson = find_lesson(options.lesson)
        if options.own is None:
            files = own_files([lesson])
        else:
            files = {file: Path(path) for file, _, path in (x.partition("=") for x in options.also)}
            files |= {file: options.own / Path(file).name for file in lesson.files}
            files = {file: path for file, path in files.items() if path.exists()}
        substitute(files)
    except LessonError as error:
        raise pytest.UsageError(str(error)) from None
    os.environ.setdefault("HYPOTHESIS_PROFILE", "lesson")
    early_config.stash[LESSON] = lesson


LESSON = pytest.StashKey[Lesson]()


def pytest_configure(config: pytest.Config) -> None:
    """Know the mark of tasks, and begin if a lesson is named."""
    config.addinivalue_line("markers", "task(number): tests the task of this number, as in 3.2")
    lesson = config.stash.get(LESSON, None)
    if lesson is not None:
        if config.args_source is not pytest.Config.ArgsSource.ARGS:
            config.args = [str(lesson.folder)]
        config.pluginmanager.register(LessonRun(config, lesson), "lesson-run")


class LessonRun:
    """Selects the tests of a lesson, times them, tells their failures and keeps the outcomes."""

    def __init__(self, config: pytest.Config, lesson: Lesson) -> None:
        self.lesson = lesson
        self.config = config
        self.only: str | None = config.option.task
        # Task to the name of each case to what it failed with; None for one that passed.
        self.outcomes: dict[str, dict[str, str | None]] = {
            task.number: {} for task in lesson.tasks if self.only in (None, task.number)
        }
        self._looping: set[str] = set()  # tasks of which a test came to no end
        self.broken: list[str] = []  # test files that could not be imported
        self.skipped: list[str] = []  # why others were left out
        config.option.reportchars = ""  # the table of tasks says it better

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """The tests of the tasks, in the order of the tasks."""
        chosen = [item for item in items if self._number(item) in self.outcomes]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        order = list(self.outcomes)
        items[:] = sorted(chosen, key=lambda item: order.index(str(self._number(item))))
        for item in items:
            self.outcomes[str(self._number(item))][case_name(item)] = "was not run"

    @staticmethod
    def _number(item: pytest.Item) -> str | None:
        mark = item.get_closest_marker("task")
        return None if mark is None else mark.args[0]

    def _task(self, item: pytest.Item) -> Task:
        return self.lesson.task(str(self._number(item)))

    @pytest.hookimpl(optionalhook=True)
    def pytest_timeout_set_timer(self) -> bool:
        """Keep pytest-timeout from setting the timer that is used below."""
        return True

    @pytest.hookimpl(optionalhook=True)
    def pytest_timeout_cancel_timer(self) -> bool:
        """And from ending it."""
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """End a test that loops, and begin a new story for it."""
        task = self._task(item)
        if task.number in self._looping:
            pytest.fail("was not run, because another test of this task came to no end")
        self._write(running=f"task {task.number}: {item.name}")
        seconds = min(task.seconds, self.config.option.task_seconds or task.seconds)

        def ring(*_: Any) -> None:
            raise TaskTimeoutError(
                f"no end after {seconds} s: look for a loop that its condition never leaves"
            )

        story.begin()
        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            return (yield)
        except TaskTimeoutError:
            self._looping.add(task.number)
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Tell a failure in the learner's terms, unless a style of traceback was asked for."""
        report = yield
        task = self._task(item)
        outcomes = self.outcomes[task.number]
        name = case_name(item)
        if report.failed:
            assert call.excinfo is not None
            outcomes[name] = what_failed(call.excinfo.value)
            if self.config.option.tbstyle == "auto":
                report.longrepr = self._told(item, task, call.excinfo)
        elif report.when == "call":
            outcomes[name] = None if report.passed else "was skipped"
        elif report.when == "setup" and report.skipped:
            outcomes[name] = "was skipped"
        return report

    def _told(
        self, item: pytest.Item, task: Task, excinfo: pytest.ExceptionInfo[BaseException]
    ) -> str:
        """What a learner needs to know of a failure."""
        error = excinfo.value
        if isinstance(error, NotImplementedError) or STILL_OPEN in str(error):
            return what_failed(error)
        lines = [f"Task {task.number}: {task.title}", "", what_failed(error)]
        told = story.text()
        drawn = hasattr(getattr(item, "obj", None), "hypothesis")
        notes = [note for note in getattr(error, "__notes__", ()) if "reproduce" not in note]
        if told:
            how = "The shortest way there that was found:" if drawn else "What happened:"
            lines += ["", how, "", indented(told)]
        elif notes:
            lines += ["", "The smallest example that was found:", ""]
            lines += [indented(note) for note in notes]
        own = {path.resolve(): path for path in substituted().values()}
        for entry in excinfo.traceback:
            path = Path(str(entry.path))
            if path in own:
                lines.append(f"{short(own[path])}:{entry.lineno + 1} in {entry.name}")
        lines += ["", f"Stuck?  minipaged lesson hint {task.number}"]
        return "\n".join(lines)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep that a test file could not be imported: none of its tests will be seen."""
        if report.failed:
            self.broken.append(str(report.longrepr).strip().splitlines()[-1])
        elif report.skipped and isinstance(report.longrepr, tuple):
            self.skipped.append(report.longrepr[2])

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """A line for every task."""
        terminalreporter.section(f"lesson {self.lesson.number}: {self.lesson.title}")
        for why in self.skipped:
            terminalreporter.write_line(why)
        for number in self.outcomes:
            task = self.lesson.task(number)
            score = self.score(task)
            passed = score == task.points and not self.broken
            mark = {"green": True} if passed else {"red": True}
            word = "done" if passed else "open" if self._is_open(number) else "not yet"
            line = f"{number:>5}  {word:8} {score:3g} of {task.points:3} points   {task.title}"
            terminalreporter.write_line(line, **mark)

    def _is_open(self, number: str) -> bool:
        outcomes = self.outcomes[number].values()
        return all(outcome and STILL_OPEN in outcome for outcome in outcomes)

    def score(self, task: Task) -> float:
        """Points of a task: all or none, or by the share of the cases."""
        return round(task.points * task.share(self.outcomes[task.number].values()), 2)

    def pytest_sessionfinish(self) -> None:
        """Write the outcomes where they are wanted."""
        self._write()

    def _write(self, running: str = "") -> None:
        """What is known so far; it stays if compiled code brings the process down."""
        path: Path | None = self.config.option.lesson_report
        if path is not None:
            report = {"outcomes": self.outcomes, "broken": self.broken}
            path.write_text(json.dumps({**report, "ended": not running, "running": running}))


def case_name(item: pytest.Item) -> str:
    """Name of a test and its parameters, without the folder."""
    return item.nodeid.rpartition("/")[2]


def what_failed(error: BaseException) -> str:
    """The error in a line or a few, without what pytest adds to explain an assertion at length."""
    text = str(error).strip()
    if isinstance(error, NotImplementedError):
        return f"{text}."
    if isinstance(error, (AssertionError, pytest.fail.Exception)):
        said, _, _ = text.partition("\nassert ")  # what follows are values, at any length
        return said or "an assertion does not hold, and gives no reason"
    if isinstance(error, OutOfBlocksError):
        return f"the pool had no block left, where it should have had some: {text}"
    return f"{type(error).__name__}: {text}"


def indented(text: str) -> str:
    """Four spaces in front of every line."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def short(path: Path) -> str:
    """A path as seen from here, where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


def pytest_report_header(config: pytest.Config) -> Iterator[str]:
    """Say whose files are tested."""
    for file, path in substituted().items():
        yield f"{file} is yours: {short(path)}"
