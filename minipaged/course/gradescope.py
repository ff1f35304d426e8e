"""What Gradescope runs: grades the one submission that is there and writes its results.

    python -m minipaged.course.gradescope [SUBMISSION [RESULTS]]

Before anything else every task is written down with no points, so that whatever happens there
is a complete result.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from minipaged.course.bundle import CONFIGURATION
from minipaged.course.grading import Grader
from minipaged.course.lesson import ROOT, find_lesson
from minipaged.course.reports import gradescope_results

SUBMISSION = Path("/autograder/submission")
RESULTS = Path("/autograder/results/results.json")


def main() -> None:
    """Grade, and write the results whatever happens."""
    submission = Path(sys.argv[1]) if len(sys.argv) > 1 else SUBMISSION
    results = Path(sys.argv[2]) if len(sys.argv) > 2 else RESULTS
    configuration = json.loads((ROOT / CONFIGURATION).read_text("utf-8"))
    lessons = [find_lesson(number) for number in configuration["lessons"]]
    results.parent.mkdir(parents=True, exist_ok=True)
    zero = {
        "score": 0,
        "output": "The grader did not come to its end; ask the instructor to run it again.",
        "tests": [
            {"name": f"{task.number} {task.title}", "score": 0, "max_score": task.points}
            for lesson in lessons
            for task in lesson.tasks
        ],
    }
    results.write_text(json.dumps(zero), "utf-8")
    hidden = ROOT / "hidden"
    with Grader(
        lessons,
        hidden if hidden.is_dir() else None,
        configuration["hidden_share"],
    ) as grader:
        grade = grader.grade(submission)
    results.write_text(json.dumps(gradescope_results(grade), indent=1), "utf-8")


if __name__ == "__main__":
    main()
