"""What becomes of grades: Gradescope's results, a table of all submissions, a summary."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minipaged.course.grading import Grade, TaskGrade


def gradescope_results(grade: Grade) -> dict[str, Any]:
    """Gradescope's results.json: a test for every task, and one for its hidden tests."""
    tests = []
    for task_grade in grade.tasks:
        task = task_grade.task
        public, hidden = task_grade.points(grade.hidden_share)
        most_hidden = task.points * grade.hidden_share if task_grade.hidden else 0.0
        tests.append(
            {
                "name": f"{task.number} {task.title}",
                "score": public,
                "max_score": round(task.points - most_hidden, 2),
                "output": task_grade.feedback or "All of its tests pass.",
                "visibility": "visible",
            }
        )
        if task_grade.hidden:
            tests.append(
                {
                    "name": f"{task.number} {task.title}: hidden tests",
                    "score": hidden,
                    "max_score": round(most_hidden, 2),
                    "output": "",
                    "visibility": "after_published",
                }
            )
    notes = "\n".join(grade.notes) or "Graded to the end."
    return {"score": grade.total, "output": notes, "visibility": "visible", "tests": tests}


def write_csv(path: Path, grades: Sequence[Grade]) -> None:
    """A row for each submission: its total, its tasks, what was noted."""
    tasks = [grade.task.number for grade in grades[0].tasks] if grades else []
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["submission", "total", *tasks, "notes"])
        for grade in grades:
            points = [sum(task.points(grade.hidden_share)) for task in grade.tasks]
            writer.writerow([grade.name, grade.total, *points, "; ".join(grade.notes)])


def summary(grades: Sequence[Grade], name_of: dict[str, str] | None = None) -> str:
    """How the class did: a histogram, the tasks, and the cases that cost most.

    name_of: what a test is called outside of the session that graded.
    """
    if not grades:
        return "no submissions"
    most = sum(grade.task.points for grade in grades[0].tasks)
    totals = [grade.total for grade in grades]
    lines = [
        f"{len(grades)} submissions, mean {sum(totals) / len(totals):.1f} of {most} points",
        "",
    ]
    bins = Counter(min(9, int(10 * total / most)) for total in totals)
    for i in range(9, -1, -1):
        first, last = most * i / 10, most * (i + 1) / 10
        lines.append(
            f"{first:5.0f} - {last:5.0f}  {bins[i]:4}  {'#' * (60 * bins[i] // len(grades))}"
        )
    lines += ["", "task   all points   mean share"]
    for place, column in enumerate(grades[0].tasks):
        shares = [sum(g.tasks[place].points(g.hidden_share)) / column.task.points for g in grades]
        full = sum(share >= 0.999 for share in shares)
        mean = sum(shares) / len(shares)
        lines.append(
            f"{column.task.number:5} {full:7} of {len(grades):3} {mean:10.0%}   {column.task.title}"
        )
    failed = Counter(
        (task.task.number, case)
        for grade in grades
        for task in grade.tasks
        for case in failures(task)
    )
    lines += ["", "what failed most often"]
    for (number, case), count in failed.most_common(20):
        test, bracket, parameters = case.partition("::")[2].partition("[")
        shown = (name_of or {}).get(test, test) + bracket + parameters
        lines.append(f"{number:5} {count:7} times   {shown}")
    if noted := [f"{grade.name}: {'; '.join(grade.notes)}" for grade in grades if grade.notes]:
        lines += ["", "to be looked at", *noted]
    return "\n".join(lines)


def failures(grade: TaskGrade) -> list[str]:
    """Cases of a task that failed."""
    cases = {**grade.cases, **grade.hidden}
    return [case for case, error in cases.items() if error is not None]
