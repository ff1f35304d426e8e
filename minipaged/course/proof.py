"""Proves that a lesson is sound (T10).

Its stub fails, each task's tests with that task's words and nothing else; the reference and
correct solutions of another shape pass; every planted bug is caught; stub and notebook are what
their sources make.  `minipaged course check N` runs it for whoever writes a lesson.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from minipaged.course import notebooks
from minipaged.course.lesson import Lesson, LessonError, Task
from minipaged.course.stubs import (
    OPEN_TASK,
    mutants,
    stub_of,
    with_open_tasks,
    write_solution,
)
from minipaged.course.substitution import Files, substitute
from minipaged.course.testing import TestOutcome, pytest_arguments

FEWEST_BUGS = 6


class UnsoundLessonError(LessonError):
    """A lesson is not what it must be."""


def run_on(
    lesson: Lesson, own: Path, task: str | None = None, *options: str, profile: str = "brief"
) -> TestOutcome:
    """Test these files as somebody's of this lesson, with so many examples as the profile says."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        arguments = [*pytest_arguments(lesson, task, own, report), *options]
        _, said = run_forked(arguments, profile=profile)
        if not report.exists():
            return TestOutcome({}, [said[-2000:]], ended=False)
        return TestOutcome(**json.loads(report.read_text("utf-8")))


def run_forked(
    arguments: list[str], files: Files | None = None, profile: str = "planted", seconds: int = 300
) -> tuple[int | None, str]:
    """pytest in a fork of a process that has imported what takes long, for it is run often.

    files: what takes the place of files of the package there.
    Returns its exit code, None if it had to be ended, and what it said.
    """
    arguments = [*arguments, "-q", "--tb=native"]
    with tempfile.TemporaryDirectory() as folder:
        order = (arguments, dict(files or {}), profile, folder, _hypothesis_folder())
        code = call_forked(_run_pytest, order, seconds)
        said = (Path(folder) / "said").read_text("utf-8", errors="replace")
        return (code if code is not None and code >= 0 else None), said


def forked(function: Callable[..., None], arguments: tuple) -> ForkServerProcess:
    """A function at work in a fork of a process that has imported what takes long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["minipaged.course.warm_up"])
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def call_forked(function: Callable[..., None], arguments: tuple, seconds: int) -> int | None:
    """Exit code of a function in such a fork.

    None if it was still at work after so many seconds, and had to be ended.
    """
    process = forked(function, arguments)
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process.exitcode


@functools.cache
def _hypothesis_folder() -> str:
    """Where Hypothesis keeps what it knows of each source file, as long as this process lives."""
    folder = tempfile.TemporaryDirectory(prefix="minipaged-hypothesis-")
    atexit.register(folder.cleanup)
    return folder.name


def _run_pytest(
    arguments: list[str], files: Files, profile: str, folder: str, hypothesis_folder: str
) -> None:
    """In the new process: pytest, with all that it says in a file."""
    said = os.open(f"{folder}/said", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ["HYPOTHESIS_PROFILE"] = profile
    import torch

    from minipaged.course.warm_up import run_pytest

    torch.set_num_threads(1)
    if files:
        substitute(files)
    os._exit(run_pytest(arguments, hypothesis_folder))


@contextlib.contextmanager
def solution(
    lesson: Lesson, change: dict | None = None, open_tasks: Collection[Task] = ()
) -> Iterator[Path]:
    """A folder with the reference as the learner's files: changed, or with some tasks open."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_solution(lesson, folder, change)
        for file in {task.file for task in open_tasks}:
            (folder / Path(file).name).write_text(with_open_tasks(file, open_tasks), "utf-8")
        yield folder


def check_generated(lesson: Lesson) -> None:
    """Stubs and notebook are what their sources make, and there are bugs enough to catch."""
    for file in lesson.files:
        path = lesson.stub(file)
        if not path.exists() or path.read_text("utf-8") != stub_of(lesson, file):
            raise UnsoundLessonError(f"{path} is not what {file} makes; run `make lessons`")
    path = notebooks.notebook_of(lesson)
    if not path.exists() or path.read_text("utf-8") != notebooks.notebook_text(lesson):
        raise UnsoundLessonError(f"{path} is not what lesson.md makes; run `make lessons`")
    bugs, _ = mutants(lesson)
    if lesson.tasks and len(bugs) < FEWEST_BUGS:
        raise UnsoundLessonError(
            f"lesson {lesson.number} has {len(bugs)} planted bugs; it needs {FEWEST_BUGS}"
        )
    for bug in bugs.values():
        if bug["file"] not in lesson.files:
            raise UnsoundLessonError(f"{bug['title']!r} is in {bug['file']}, which nobody writes")


def check_task_fails_alone(lesson: Lesson, task: Task) -> None:
    """With this task open and all others done, its tests fail, with its words and no others."""
    with solution(lesson, open_tasks=[task]) as folder:
        outcome = run_on(lesson, folder, task.number)
    cases = outcome.outcomes.get(task.number, {})
    if outcome.broken or not cases:
        raise UnsoundLessonError(f"task {task.number} has no test that runs: {outcome.broken}")
    words = [OPEN_TASK.format(number=task.number, name=name) for name in task.functions]
    for case, error in cases.items():
        if error is None:
            raise UnsoundLessonError(f"{case} passes although task {task.number} is open")
        if not task.plant and not any(word in error for word in words):
            raise UnsoundLessonError(f"{case} fails, but not with task {task.number}: {error}")


def check_task_passes_before_the_next(lesson: Lesson, task: Task) -> None:
    """Who has written the tasks up to this one passes its tests, whatever is open behind it."""
    later = lesson.tasks[lesson.tasks.index(task) + 1 :]
    with solution(lesson, open_tasks=later) as folder:
        outcome = run_on(lesson, folder, task.number)
    for case, error in outcome.outcomes.get(task.number, {"no test": "ran"}).items():
        if error is not None:
            raise UnsoundLessonError(f"{case} needs what comes after task {task.number}: {error}")


def check_stub_fails(lesson: Lesson) -> None:
    """On the stub as it is handed out every test fails with the words of a task."""
    outcome = run_on(lesson, lesson.folder / "stubs")
    if outcome.broken or not outcome.ended:
        raise UnsoundLessonError(f"the stub cannot be tested: {outcome.broken}")
    planted = any(task.plant for task in lesson.tasks)
    for case, error in outcome.cases.items():
        if error is None or not ("Task " in error or planted):
            raise UnsoundLessonError(f"on the stub {case} says {error!r}, which names no task")


def check_passes(lesson: Lesson, change: dict | None = None) -> None:
    """The reference, or a correct solution of another shape, passes every test."""
    with solution(lesson, change) as folder:
        outcome = run_on(lesson, folder)
    if outcome.broken or not outcome.ended:
        raise UnsoundLessonError(f"the tests did not run: {outcome.broken}")
    for case, error in outcome.cases.items():
        if error is not None:
            raise UnsoundLessonError(f"{case} fails on a correct solution: {error}")


def check_bug_is_caught(lesson: Lesson, bug: dict) -> None:
    """The test that the bug names fails on it, and does not merely break."""
    named = bug.get("caught_by")
    tests = [str(lesson.folder / named)] if named else []
    with solution(lesson, bug) as folder:
        outcome = run_on(lesson, folder, None, "-x", *tests, profile="planted")
    if outcome.broken:
        raise UnsoundLessonError(f"{bug['title']!r} breaks the tests: {outcome.broken}")
    failed = [
        case
        for case, error in outcome.cases.items()
        if error not in (None, "was not run", "was skipped")
    ]
    if not failed:
        raise UnsoundLessonError(f"{bug['title']!r} is not caught by {named or 'any test'}")
    if not named:
        raise UnsoundLessonError(
            f"{bug['title']!r} does not say which test catches it; "
            f'write caught_by = "{failed[0].partition("[")[0]}" beside its name'
        )


def all_checks(lesson: Lesson) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every check of a lesson: what it shows, and the function that raises where it does not."""
    yield "stub and notebook are up to date", functools.partial(check_generated, lesson)
    if not lesson.tasks:
        return
    bugs, variants = mutants(lesson)
    yield "the reference passes", functools.partial(check_passes, lesson)
    yield "the stub names its tasks", functools.partial(check_stub_fails, lesson)
    for task in lesson.tasks:
        yield f"task {task.number} alone", functools.partial(check_task_fails_alone, lesson, task)
        if task is not lesson.tasks[-1]:
            check = functools.partial(check_task_passes_before_the_next, lesson, task)
            yield f"task {task.number} without later ones", check
    for name, variant in variants.items():
        yield f"passes: {name}", functools.partial(check_passes, lesson, variant)
    for name, bug in bugs.items():
        yield f"caught: {name}", functools.partial(check_bug_is_caught, lesson, bug)
