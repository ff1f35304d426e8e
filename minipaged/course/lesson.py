"""A lesson as its lesson.toml says: which parts of which modules are to be written, and for what.

Owns the format of that file and where things lie: the folder of a lesson, its stubs, the
learner's files.  It empties, runs and grades nothing.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from minipaged.errors import ConfigurationError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
"""The project: minipaged/, cuda/, lessons/ and tests/ are in it."""


class LessonError(ConfigurationError):
    """A lesson or a task that is not there, or is not described as it must be."""


@dataclass(frozen=True)
class Task:
    """One thing to write.

    number: of the lesson and of the task in it, as in "3.2".
    file: of the package, relative to the project; the learner's file takes its place.
    empty: functions to write again, by their qualified names; in a CUDA file a name may be
        followed by " from TEXT": all from the line with that text on.
    plant: planted bugs that are in the stub, to be found, instead of emptied functions.
    seconds: after which a test of the task is said to loop.
    hints: the idea, the invariant, the first line.
    by_case: points are given for every case of the tests, not for all of them together; so are
        properties graded that the learner writes, by the bugs that they catch.
    """

    number: str
    title: str
    points: int
    file: str
    hints: tuple[str, str, str]
    empty: tuple[str, ...] = ()
    plant: tuple[str, ...] = ()
    seconds: int = 60
    by_case: bool = False

    @property
    def is_python(self) -> bool:
        """Whether the file is a Python module, and not CUDA."""
        return self.file.endswith(".py")

    @property
    def functions(self) -> list[str]:
        """Names of the functions to write."""
        return [name.partition(" from ")[0] for name in self.empty]

    def share(self, outcomes: Collection[str | None]) -> float:
        """How much of the points these cases give, 0 to 1; None is a case that passed."""
        passed = sum(outcome is None for outcome in outcomes)
        if not passed or (passed < len(outcomes) and not self.by_case):
            return 0.0
        return passed / len(outcomes)


@dataclass(frozen=True)
class Lesson:
    """One lesson, in its folder.

    requires: earlier lessons, by number, whose modules this one builds on.
    sections: of the paper.
    run: a command of `minipaged` that runs on what was written; None where the notebook alone does.
    """

    number: int
    title: str
    folder: Path
    sections: str
    minutes: int
    requires: tuple[int, ...]
    tasks: tuple[Task, ...]
    run: str | None

    @property
    def name(self) -> str:
        """Number and name, as its folder is called."""
        return self.folder.name

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Files of the package that the learner writes, each once."""
        return tuple(dict.fromkeys(task.file for task in self.tasks))

    def own_file(self, file: str) -> Path:
        """Where the learner writes a file of the package."""
        return self.folder / Path(file).name

    def stub(self, file: str) -> Path:
        """Where the generated stub of it lies, which the learner begins with."""
        return self.folder / "stubs" / Path(file).name

    def task(self, number: str) -> Task:
        """The task of this number; LessonError if there is none."""
        for task in self.tasks:
            if task.number == number:
                return task
        known = ", ".join(task.number for task in self.tasks) or "none"
        raise LessonError(f"lesson {self.number} has no task {number}; it has {known}")

    @property
    def command(self) -> str | None:
        """What to type to see what was written at work."""
        if self.run is None:
            return None
        command, _, options = self.run.partition(" ")
        return f"minipaged {command} --lessons {self.number} {options}".rstrip()

    @property
    def points(self) -> int:
        """Points of all tasks."""
        return sum(task.points for task in self.tasks)


def lessons_folder() -> Path:
    """Where the lessons are: in the project, or where MINIPAGED_LESSONS says."""
    folder = Path(os.environ.get("MINIPAGED_LESSONS", ROOT / "lessons"))
    if not folder.is_dir():
        raise LessonError(
            f"found no lessons in {folder}; they come with the project's source, so clone it and "
            "install it from there with `pip install --editable .`"
        )
    return folder


def all_lessons() -> list[Lesson]:
    """Every lesson that is there, in order."""
    return [read_lesson(path.parent) for path in sorted(lessons_folder().glob("*/lesson.toml"))]


def find_lesson(number: int) -> Lesson:
    """The lesson of this number; LessonError if there is none."""
    for path in lessons_folder().glob(f"{number:02d}-*/lesson.toml"):
        return read_lesson(path.parent)
    known = ", ".join(str(lesson.number) for lesson in all_lessons())
    raise LessonError(f"there is no lesson {number}; choose one of {known}")


def find_task(number: str) -> tuple[Lesson, Task]:
    """The task N.M and its lesson; LessonError if there is none."""
    match = re.fullmatch(r"(\d+)\.(\d+)", number)
    if match is None:
        raise LessonError(f"{number!r} is no task; a task is named by two numbers, as in 3.2")
    lesson = find_lesson(int(match[1]))
    return lesson, lesson.task(number)


def parse_numbers(text: str) -> list[int]:
    """Lessons named like "3,4,8", each once; LessonError for anything else."""
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise LessonError(
            f"{text!r} names no lessons; give their numbers with commas between, as in 3,4,8"
        ) from None


def read_lesson(folder: Path) -> Lesson:
    """The lesson that a folder's lesson.toml describes; LessonError says what is wrong in it."""
    path = folder / "lesson.toml"
    match = re.fullmatch(r"(\d\d)-[a-z0-9-]+", folder.name)
    if match is None:
        raise LessonError(f"{folder.name} must be two digits and a name, as in 03-block-allocator")
    number = int(match[1])
    try:
        fields = tomllib.loads(path.read_text("utf-8"))
        tasks = tuple(_tasks(number, fields.pop("tasks", [])))
        return Lesson(
            number=number,
            folder=folder,
            tasks=tasks,
            requires=tuple(fields.pop("requires", ())),
            run=fields.pop("run", None),
            **fields,
        )
    except (OSError, TypeError, ValueError) as error:
        raise LessonError(f"{path} does not describe a lesson: {error}") from error


def _tasks(lesson: int, entries: list[dict[str, Any]]) -> Iterator[Task]:
    for place, entry in enumerate(entries, start=1):
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()
        }
        task = Task(number=f"{lesson}.{place}", **fields)
        if len(task.hints) != 3:
            raise ValueError(f"task {task.number} has {len(task.hints)} hints; give it 3")
        if bool(task.empty) == bool(task.plant):
            raise ValueError(f"task {task.number} must either empty functions or plant bugs")
        yield task
