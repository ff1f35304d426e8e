"""`minipaged course`: for those who teach with the lessons, and those who write them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from minipaged.cli.options import CsvOption

course_app = typer.Typer(
    help="Assignments, grading, and checks of the lessons.", no_args_is_help=True
)

LessonsOption = Annotated[str, typer.Option("--lessons", help="their numbers, as in 3,4")]
HiddenOption = Annotated[
    Path | None,
    typer.Option(help="a folder of more tests, marked with their tasks like public ones"),
]
ShareOption = Annotated[float, typer.Option(help="of the points that hidden tests give, 0 to 1")]
OutOption = Annotated[
    Path, typer.Option("--output", "-o", file_okay=False, help="folder for what is made")
]

Lessons = Annotated[list[int] | None, typer.Argument(metavar="[N]...", help="all, if left out")]


@course_app.command()
def generate(numbers: Lessons = None) -> None:
    """Write the stubs and notebooks that the sources of the lessons make."""
    from minipaged.course.lesson import all_lessons, find_lesson
    from minipaged.course.notebooks import write_notebook
    from minipaged.course.stubs import write_stubs

    for lesson in map(find_lesson, numbers) if numbers else all_lessons():
        for path in (*write_stubs(lesson), write_notebook(lesson)):
            print(path)


@course_app.command()
def check(
    numbers: Lessons = None,
    run: Annotated[bool, typer.Option("--run", help="run the notebook as well")] = False,
) -> None:
    """Prove that lessons are sound: stubs fail, solutions pass, planted bugs are caught."""
    from minipaged.course.lesson import LessonError, all_lessons, find_lesson
    from minipaged.course.notebooks import run_notebook
    from minipaged.course.proof import all_checks

    failed = 0
    for lesson in map(find_lesson, numbers) if numbers else all_lessons():
        print(f"lesson {lesson.number}: {lesson.title}")
        for what, function in all_checks(lesson):
            start = time.perf_counter()
            try:
                function()
                said = "ok"
            except LessonError as error:
                failed += 1
                said = f"NO: {error}"
            print(f"  {time.perf_counter() - start:5.1f} s  {what}: {said}", flush=True)
        if run:
            start = time.perf_counter()
            run_notebook(lesson)
            print(f"  {time.perf_counter() - start:5.1f} s  the notebook runs: ok")
    raise typer.Exit(1 if failed else 0)


@course_app.command()
def bundle(lessons: LessonsOption, output: OutOption = Path("dist")) -> None:
    """Make an assignment: a folder and a zip without solutions, checked to be so."""
    from minipaged.course.bundle import make_zip, write_bundle
    from minipaged.course.lesson import find_lesson, parse_numbers

    chosen = [find_lesson(number) for number in parse_numbers(lessons)]
    folder = output / ("assignment-" + "-".join(f"{lesson.number:02d}" for lesson in chosen))
    write_bundle(chosen, folder)
    for lesson in chosen:
        check_stub_fails_in(folder, lesson.number)
    print(f"{folder} and {make_zip(folder)}: no solution is in it, and its tests fail as they must")


def check_stub_fails_in(folder: Path, number: int) -> None:
    """In a bundle every test of a lesson fails with the words of a task."""
    import os
    import subprocess
    import sys

    from minipaged.errors import ConfigurationError

    code = (
        "import sys\n"
        "from minipaged.course.lesson import find_lesson\n"
        "from minipaged.course.proof import check_stub_fails\n"
        "check_stub_fails(find_lesson(int(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(number)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder.resolve())},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ConfigurationError(
            f"in {folder} lesson {number} does not fail as it must: {done.stderr[-1500:]}"
        )


@course_app.command()
def autograder(
    lessons: LessonsOption,
    output: OutOption = Path("dist"),
    hidden: HiddenOption = None,
    hidden_share: ShareOption = 0.5,
) -> None:
    """Make an autograder for Gradescope: a zip to upload, and the folder that it was made of."""
    from minipaged.course.bundle import make_zip, write_autograder
    from minipaged.course.lesson import find_lesson, parse_numbers

    chosen = [find_lesson(number) for number in parse_numbers(lessons)]
    folder = output / ("autograder-" + "-".join(f"{lesson.number:02d}" for lesson in chosen))
    write_autograder(chosen, folder, hidden, hidden_share)
    print(f"{make_zip(folder)} is to be uploaded; {folder} is what is in it")


@course_app.command()
def grade(
    submissions: Annotated[
        list[Path], typer.Argument(help="folders or zips; or one folder of them")
    ],
    lessons: LessonsOption,
    hidden: HiddenOption = None,
    hidden_share: ShareOption = 0.5,
    jobs: Annotated[int, typer.Option(min=1, help="submissions at a time")] = 2,
    seed: Annotated[int | None, typer.Option(help="of the examples; drawn if left out")] = None,
    allow: Annotated[list[str] | None, typer.Option(help="a module that may be imported")] = None,
    csv: CsvOption = None,
) -> None:
    """Grade one submission, or many side by side: points, feedback, a summary of the class."""
    from minipaged.course.grading import Grader, grade_all
    from minipaged.course.lesson import find_lesson, parse_numbers
    from minipaged.course.reports import summary, write_csv

    chosen = [find_lesson(number) for number in parse_numbers(lessons)]
    paths = found_submissions(submissions)
    start = time.perf_counter()
    with Grader(chosen, hidden, hidden_share, seed=seed, allowed=allow or ()) as grader:
        grades = []
        for result in grade_all(grader, paths, jobs):
            grades.append(result)
            noted = f"   ({'; '.join(result.notes)})" if result.notes else ""
            print(f"{result.total:7g}  {result.name}{noted}", flush=True)
            if csv is not None:
                write_csv(csv, grades)
        if len(grades) == 1:
            for task in grades[0].tasks:
                points = sum(task.points(hidden_share))
                print(f"\n{task.task.number}  {points:g} of {task.task.points}  {task.task.title}")
                print(task.feedback)
        else:
            print("\n" + summary(grades, grader.names))
    print(f"\nseed {grader.seed}, {time.perf_counter() - start:.0f} s")


def found_submissions(paths: list[Path]) -> list[Path]:
    """Each path by itself; of one folder that is not a learner's own, the folders and zips in it.

    A learner's own has source files or the folder of lessons in it.
    """
    from minipaged.course.lesson import LessonError
    from minipaged.course.submission import is_zip, printable

    if missing := [path for path in paths if not path.exists()]:
        raise LessonError(f"there is no submission {missing[0]}")
    for path in paths:
        if path.is_file() and not is_zip(path):
            raise LessonError(
                f"{path} is a file; put the files of each student in a folder or a zip of their own"
            )
    if len(paths) == 1 and paths[0].is_dir():
        inside = sorted(path for path in paths[0].iterdir() if not path.name.startswith("."))
        own = any(path.suffix in (".py", ".cuh") or path.name == "lessons" for path in inside)
        found = [path for path in inside if path.is_dir() or is_zip(path)]
        if found and not own:
            if others := [printable(path.name) for path in inside if path not in found]:
                print(f"passed over, being neither folders nor zips: {', '.join(others)}")
            return found
    return paths
