"""`minipaged lesson`: begin a lesson, test it, get a hint, see how far one is."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from minipaged.course.lesson import Lesson
    from minipaged.course.progress import Progress

lesson_app = typer.Typer(help="Write the modules yourself, lesson by lesson.", no_args_is_help=True)

Number = Annotated[int, typer.Argument(metavar="N", help="number of the lesson")]
TaskNumber = Annotated[str, typer.Argument(metavar="N.M", help="number of the task")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="do not ask")]


@lesson_app.command("list")
def list_lessons() -> None:
    """All lessons, what they ask for, and how far you are."""
    from minipaged.course.lesson import all_lessons
    from minipaged.course.progress import Progress

    progress = Progress.load()
    table = Table("", "lesson", "paper", "minutes", "builds on", "points", box=None)
    for lesson in all_lessons():
        builds_on = ", ".join(map(str, lesson.requires))
        points = f"{progress.of(lesson):g} of {lesson.points}" if lesson.tasks else ""
        number, minutes = f"{lesson.number:02d}", str(lesson.minutes)
        table.add_row(number, lesson.title, lesson.sections, minutes, builds_on, points)
    Console(highlight=False).print(table)


@lesson_app.command()
def start(number: Number) -> None:
    """Make your files of a lesson; what you have already is left as it is."""
    from minipaged.course.lesson import all_lessons, find_lesson
    from minipaged.course.notebooks import notebook_of
    from minipaged.course.progress import Progress
    from minipaged.course.substitution import own_place

    lesson, progress = find_lesson(number), Progress.load()
    for file in lesson.files:
        own = own_place(lesson, file)
        if own.exists():
            print(f"{shown(own)} is there already, and left as it is")
        else:
            own.write_text(lesson.stub(file).read_text("utf-8"), "utf-8")
            print(f"{shown(own)} is yours to complete")
    for earlier in all_lessons():  # an assignment may have only some
        if earlier.number in lesson.requires and not progress.is_done(earlier):
            print(f"it builds on lesson {earlier.number}, {earlier.title}, which is not done yet")
    print(f"read     {shown(notebook_of(lesson))}")
    if lesson.tasks:
        print(f"test     minipaged lesson test {number}")


@lesson_app.command("test")
def run_tests_of(
    number: Annotated[str, typer.Argument(metavar="N or N.M", help="a lesson, or one task of it")],
    verbose: Annotated[bool, typer.Option("--verbose", help="with whole tracebacks")] = False,
) -> None:
    """Test your files of a lesson, or of one task; ends with 0 if everything passes."""
    from minipaged.course.lesson import find_lesson, find_task, parse_numbers
    from minipaged.course.progress import Progress
    from minipaged.course.submission import suspicious
    from minipaged.course.substitution import assigned
    from minipaged.course.testing import run_tests

    if "." in number:
        lesson, _ = find_task(number)
        tasks = [number]
    else:
        lesson = find_lesson(parse_numbers(number)[0])
        tasks = [task.number for task in lesson.tasks]
    if not tasks:
        print(f"lesson {lesson.number} has nothing to test: read and run its notebook")
        return
    files = own_files_of(lesson)  # says so if there are none
    task = number if "." in number else None
    outcome = run_tests(lesson, task, "-q", *(["--tb=long"] if verbose else []))
    for file, own in files.items() if assigned() else ():  # an assignment is graded
        if wrong := suspicious(own, lesson.stub(file).read_text("utf-8")):
            print(f"\nThis would be refused when it is graded: {wrong}")
    progress = Progress.load()
    progress.note(lesson, outcome)
    done = all(outcome.score(lesson).get(n) == lesson.task(n).points for n in tasks)
    if done and task is None:
        print(f"\nAll of lesson {lesson.number}.  The last cell of its notebook runs on your code")
        if lesson.command is not None:
            print(f"now, and so does:\n{lesson.command}")
    raise typer.Exit(0 if done else 1)


@lesson_app.command()
def hint(
    task_number: TaskNumber,
    level: Annotated[
        int | None, typer.Option(min=1, max=3, help="1 the idea, 2 the invariant, 3 the first line")
    ] = None,
) -> None:
    """The next of the three hints of a task, or the one you name."""
    from minipaged.course.lesson import find_task
    from minipaged.course.progress import Progress

    _, task = find_task(task_number)
    progress = Progress.load()
    shown_before = progress.hints.get(task_number, 0)
    level = level or min(shown_before + 1, 3)
    progress.hints[task_number] = max(shown_before, level)
    progress.save()
    kind = ("the idea", "the invariant", "the first line")[level - 1]
    console = Console(highlight=False)
    console.print(f"Task {task_number}, {task.title}: hint {level} of 3, {kind}\n", style="bold")
    console.print(task.hints[level - 1], markup=False)


@lesson_app.command()
def diff(
    number: Number,
    stub: Annotated[bool, typer.Option("--stub", help="what you wrote, not the reference")] = False,
    yes: Yes = False,
) -> None:
    """How your files differ from the reference: to read when you are done."""
    from minipaged.course.lesson import ROOT, find_lesson
    from minipaged.course.progress import Progress

    lesson = find_lesson(number)
    files = own_files_of(lesson)
    if not (stub or yes or Progress.load().is_done(lesson)):
        typer.confirm("Your lesson is not done, and this shows the solution.  Go on?", abort=True)
    for file, own in files.items():
        other = lesson.stub(file) if stub else ROOT / file
        before, after = (p.read_text("utf-8").splitlines(keepends=True) for p in (other, own))
        lines = difflib.unified_diff(before, after, str(shown(other)), str(shown(own)))
        print("".join(lines), end="")


@lesson_app.command()
def reset(number: Number, yes: Yes = False) -> None:
    """Begin a lesson anew; what you had is kept beside it as a backup."""
    from minipaged.course.lesson import LessonError, find_lesson

    lesson = find_lesson(number)
    files = own_files_of(lesson)
    if not files:
        raise LessonError(f"lesson {number} has no files to begin anew: nothing is written in it")
    if not yes:
        names = " and ".join(str(shown(path)) for path in files.values())
        typer.confirm(f"Replace {names} by the stub?  A backup is kept.", abort=True)
    for file, own in files.items():
        backup = free_name(own)
        own.rename(backup)
        own.write_text(lesson.stub(file).read_text("utf-8"), "utf-8")
        print(f"{shown(own)} is the stub again; what it was is {shown(backup)}")


@lesson_app.command()
def progress() -> None:
    """Every task and what its tests said last."""
    from minipaged.course.lesson import all_lessons
    from minipaged.course.progress import Progress

    known = Progress.load()
    table = Table("task", "", "points", "hints seen", box=None)
    lessons = [lesson for lesson in all_lessons() if lesson.tasks]
    for lesson in lessons:
        table.add_row(f"{lesson.number:02d}", lesson.title, "", "", style="bold")
        for task in lesson.tasks:
            points = _points(known, lesson, task.number)
            hints = known.hints.get(task.number, 0)
            table.add_row(task.number, task.title, points, str(hints) if hints else "")
    console = Console(highlight=False)
    console.print(table)
    total = sum(known.of(lesson) for lesson in lessons)
    console.print(f"{total:g} of {sum(lesson.points for lesson in lessons)} points")


def _points(known: Progress, lesson: Lesson, number: str) -> str:
    points = known.points.get(number)
    return "not tested" if points is None else f"{points:g} of {lesson.task(number).points}"


def own_files_of(lesson: Lesson) -> dict[str, Path]:
    """Those of this lesson alone; of an assignment the others must be there, too."""
    from minipaged.course.substitution import own_files

    files = own_files([lesson])
    return {file: files[file] for file in lesson.files}


def free_name(path: Path) -> Path:
    """A name beside the file that is not taken, for its backup."""
    count = 1
    while (backup := path.with_name(f"{path.name}.{count}.bak")).exists():
        count += 1
    return backup


def shown(path: Path) -> Path:
    """A path as it is seen from here, where that is shorter."""
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path
