"""Runs the tests of a lesson on somebody's files, in a process of their own.

Learner code may loop, die or print; the process that asks does not.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from minipaged.course.lesson import ROOT, Lesson, LessonError

PLUGINS = ("pytest_timeout", "_hypothesis_pytestplugin")
UNUSED = """cacheprovider unraisableexception threadexception
    doctest legacypath pastebin setuponly setupplan"""
WITHOUT = [f"-pno:{name}" for name in UNUSED.split()]


@dataclass(frozen=True)
class TestOutcome:
    """What the tests said.

    outcomes: of each task that was tested, each case and what it failed with; None if it passed.
    broken: why test files could not be imported, if so.
    ended: whether the tests came to their end at all.
    running: the test that ran last.
    """

    __test__ = False  # for pytest it is no test

    outcomes: dict[str, dict[str, str | None]]
    broken: list[str] = field(default_factory=list)
    ended: bool = True
    running: str = ""

    @property
    def cases(self) -> dict[str, str | None]:
        """The cases of all tasks."""
        return {case: e for cases in self.outcomes.values() for case, e in cases.items()}

    def score(self, lesson: Lesson) -> dict[str, float]:
        """Points of each task that was tested."""
        return {
            number: 0 if self.broken else task.points * task.share(cases.values())
            for number, cases in self.outcomes.items()
            for task in (lesson.task(number),)
        }


def pytest_arguments(
    lesson: Lesson, task: str | None = None, own: Path | None = None, report: Path | None = None
) -> list[str]:
    """What to give pytest to test a lesson, or one task of it.

    own: where the learner's files are, if not in the lesson's folder.
    report: the file in which the outcomes are wanted.
    """
    # With "=": pytest takes the common folder of all paths among its arguments for the project.
    arguments = [f"--lesson={lesson.number}", f"--rootdir={ROOT}", f"-c={ROOT / 'pyproject.toml'}"]
    if task is not None:
        arguments.append(f"--task={task}")
    if own is not None:
        arguments.append(f"--own={own}")
    if report is not None:
        arguments.append(f"--lesson-report={report}")
    return arguments


def run_tests(lesson: Lesson, task: str | None = None, *options: str) -> TestOutcome:
    """Test the learner's files of a lesson, printing what pytest prints."""
    if missing := [name for name in ("pytest", "hypothesis") if find_spec(name) is None]:
        raise LessonError(
            f"testing needs {missing[0]}, which is not installed; "
            "`pip install --editable '.[lessons]'` installs all that the lessons need"
        )
    seconds = 60 + sum(task.seconds for task in lesson.tasks)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pytest", *pytest_arguments(lesson, task, report=report)]
        try:
            code = subprocess.run([*command, *options], timeout=seconds).returncode
        except subprocess.TimeoutExpired:  # compiled code cannot be interrupted from within
            code = None
        if not report.exists():
            if code == 4:  # it has said why
                raise LessonError(f"lesson {lesson.number} could not be tested")
            how = f"came to no end in {seconds} s" if code is None else f"ended (exit code {code})"
            files = " and ".join(Path(file).name for file in lesson.files)
            print(
                f"\nThe process that tests {how} and tested nothing; "
                f"look at what {files} does when it is imported"
            )
            return TestOutcome({}, ended=False)
        outcome = TestOutcome(**json.loads(report.read_text("utf-8")))
    if not outcome.ended:
        why = f"was killed after {seconds} s" if code is None else f"died (exit code {code})"
        print(f"\nThe process that tested {why}, in {outcome.running}")
    return outcome
