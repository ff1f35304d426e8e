"""What the tests said of each task when they last ran, and how many hints were looked at.

Kept in one small file beside the lessons.  Nobody but the tests says that a task is done; a
task whose file was changed since is shown as it was tested.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from minipaged.course.lesson import Lesson, LessonError, lessons_folder
from minipaged.course.testing import TestOutcome


@dataclass
class Progress:
    """Points of tasks and hints shown, both by the number of the task."""

    points: dict[str, float] = field(default_factory=dict)
    hints: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def file() -> Path:
        """Where it is kept."""
        return lessons_folder() / "progress.json"

    @classmethod
    def load(cls) -> Progress:
        """What is known; nothing if there is no file.  LessonError for a damaged one."""
        try:
            return cls(**json.loads(cls.file().read_text("utf-8")))
        except FileNotFoundError:
            return cls()
        except (OSError, TypeError, ValueError) as error:
            raise LessonError(
                f"{cls.file()} cannot be read ({error}); remove it and test your lessons again"
            ) from error

    def save(self) -> None:
        """Write it; whoever reads meanwhile finds the old file or the new one."""
        new = self.file().with_suffix(".new")
        new.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")
        new.replace(self.file())

    def note(self, lesson: Lesson, outcome: TestOutcome) -> None:
        """Take over what the tests said."""
        self.points.update(outcome.score(lesson))
        self.save()

    def is_done(self, lesson: Lesson) -> bool:
        """Whether all tasks of the lesson have all their points."""
        return all(self.points.get(task.number) == task.points for task in lesson.tasks)

    def of(self, lesson: Lesson) -> float:
        """Points of the lesson so far."""
        return sum(self.points.get(task.number, 0) for task in lesson.tasks)
