"""`minipaged course`: for those who teach with the lessons, and those who write them."""

from __future__ import annotations

import time
from typing import Annotated

import typer

course_app = typer.Typer(
    help="Assignments, grading, and checks of the lessons.", no_args_is_help=True
)

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
