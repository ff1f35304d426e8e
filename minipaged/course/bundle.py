"""Assignments and autograders: the project without the bodies that are asked for.

A bundle is a folder that stands by itself: the package with the graded functions emptied, the
learner's files in the lessons' folders, the public tests and what they import.  An autograder is
the same with hidden tests beside it, in the form that Gradescope runs.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from minipaged.course.lesson import ROOT, Lesson, LessonError
from minipaged.course.stubs import reference_bodies, with_open_tasks
from minipaged.course.substitution import ASSIGNMENT

TASK_MARK = re.compile(r"mark\.task\(['\"]([\d.]+)['\"]\)")
PACKAGE = ("minipaged", "cuda", "pyproject.toml", "conftest.py")
CONFIGURATION = "grading.json"
TEXTS = (".py", ".md", ".ipynb", ".toml", ".cuh", ".cu", ".h", ".cpp", ".json", ".txt")


def bundle_stub(file: str, lessons: Sequence[Lesson], first: Lesson | None = None) -> str:
    """A file without what any of these lessons asks for.

    first: the lesson whose words are used where several ask for the same function.
    """
    ordered = sorted(lessons, key=lambda lesson: lesson is first)
    return with_open_tasks(file, [task for lesson in ordered for task in lesson.tasks])


def write_bundle(lessons: Sequence[Lesson], folder: Path) -> None:
    """Fill a folder, which must not exist yet, with an assignment of these lessons."""
    if folder.exists():
        raise LessonError(f"{folder} is there already; remove it or choose another place")
    if empty := [lesson.number for lesson in lessons if not lesson.tasks]:
        raise LessonError(f"lesson {empty[0]} has no tasks to grade; choose others")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.o", "*.lock")
    folder.mkdir(parents=True)
    for name in PACKAGE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    for file in {file for lesson in lessons for file in lesson.files}:
        (folder / file).write_text(bundle_stub(file, lessons), "utf-8")
    (folder / "tests").mkdir()
    begun: set[str] = set()
    for lesson in lessons:
        own = folder / "lessons" / lesson.name
        (own / "stubs").mkdir(parents=True)
        for pattern in ("lesson.*", "test_*.py"):
            for path in lesson.folder.glob(pattern):
                shutil.copy(path, own / path.name)
        for file in lesson.files:
            stub = bundle_stub(file, lessons, first=lesson)
            (own / "stubs" / Path(file).name).write_text(stub, "utf-8")
            if file not in begun:  # one that several lessons ask for is written once
                (own / Path(file).name).write_text(stub, "utf-8")
                begun.add(file)
        for link in re.findall(r"\]\(\.\./\.\./([^)]+)\)", (own / "lesson.md").read_text("utf-8")):
            (folder / link).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / link, folder / link)
    for path in helpers(lessons):
        shutil.copy(path, folder / "tests" / path.name)
    (folder / "README.md").write_text(instructions(lessons), "utf-8")
    numbers = [lesson.number for lesson in lessons]
    (folder / ASSIGNMENT).write_text(json.dumps(numbers) + "\n", "utf-8")
    check_bundle(lessons, folder)


def helpers(lessons: Sequence[Lesson]) -> list[Path]:
    """Files of tests/ that the tests of these lessons import, and what those import."""
    found: dict[Path, None] = {}
    queue = [path for lesson in lessons for path in lesson.folder.glob("test_*.py")]
    while queue:
        text = queue.pop().read_text("utf-8")
        for name in re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE):
            path = ROOT / "tests" / f"{name}.py"
            if path.exists() and path not in found:
                found[path] = None
                queue.append(path)
    return list(found)


def instructions(lessons: Sequence[Lesson]) -> str:
    """The README of a bundle."""
    graded = {file for lesson in lessons for file in lesson.files}
    given = [n for lesson in lessons for n in lesson.requires]
    given = sorted(set(given) - {lesson.number for lesson in lessons})
    lines = ["# Assignment", "", "Complete these files; everything else is given:", ""]
    for lesson in lessons:
        for file in lesson.files:
            points = sum(task.points for task in lesson.tasks if task.file == file)
            home = next(other for other in lessons if file in other.files)
            lines.append(
                f"- `lessons/{home.name}/{Path(file).name}` "
                f"(lesson {lesson.number}, {lesson.title}: {points} points)"
            )
    if given:
        numbers = ", ".join(map(str, given))
        lines += ["", f"What they build on, of lessons {numbers}, is complete in `minipaged/`."]
    if len(lessons) > 1:
        lines += [
            "",
            "Work through them in this order: later ones run on what you wrote before.  Where a",
            "test says that a task of another lesson is still to be written, write that one first.",
        ]
    if len(graded) < sum(len(lesson.files) for lesson in lessons):
        lines += ["", "A file that two lessons ask for is in the folder of the first, for both."]
    commands = [lesson.command for lesson in lessons if lesson.command is not None]
    lines += [
        "",
        "```console",
        '$ pip install --editable ".[lessons]"',
        *(f"$ minipaged lesson test {lesson.number}" for lesson in lessons),
        *(f"$ {command}" for command in commands),
        "```",
        "",
        "Read `lesson.ipynb` in the folder of each lesson.  Hand in a folder or a zip with your",
        "files, under the names that they have above.  A file may import what its stub imports,",
        "and plain modules of Python such as `math` and `itertools`; one that imports anything",
        "else is refused.",
    ]
    return "\n".join(lines) + "\n"


def squeezed(text: str) -> str:
    """A text without what may differ between two ways to write the same code."""
    return re.sub(r"\\n|\s|[\"'\\]", "", text)


def check_bundle(lessons: Sequence[Lesson], folder: Path) -> None:
    """No reference body is anywhere in the bundle.  LessonError names the first that is."""
    bodies = {
        f"{name} of lesson {lesson.number}": squeezed(body)
        for lesson in lessons
        for _, name, body in reference_bodies(lesson)
    }
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix in TEXTS:
            text = squeezed(path.read_text("utf-8"))
            for name, body in bodies.items():
                # One short line may well stand elsewhere, and gives nothing away.
                if len(body) > 60 and body in text:
                    raise LessonError(f"{path.relative_to(folder)} has the solution of {name}")


SETUP = """\
#!/usr/bin/env bash
# Installs what the tests of these lessons import; nothing else is fetched.
set -euo pipefail
apt-get update -qq
apt-get install -y -qq python3 python3-pip python3-venv {packages} >/dev/null
python3 -m venv /autograder/venv
/autograder/venv/bin/pip install --quiet {requirements}
"""

RUN = """\
#!/usr/bin/env bash
# Grades what is in /autograder/submission.  The full list of tasks, at zero, is written first.
cd /autograder/source
exec env PYTHONPATH=/autograder/source /autograder/venv/bin/python -m minipaged.course.gradescope
"""

SMALL = ["pytest", "pytest-timeout", "hypothesis", "numpy", "tomli"]
LARGE = ["torch>=2.6,<2.14", "safetensors", "tokenizers", "jaxtyping", "jinja2", "typer", "rich"]
SERVING = ["fastapi>=0.115", "uvicorn>=0.32", "prometheus-client>=0.21", "httpx>=0.27"]


def check_hidden(lessons: Sequence[Lesson], hidden: Path | None, hidden_share: float) -> None:
    """LessonError for hidden tests that would count for nothing, and a share that is none."""
    if not 0 <= hidden_share <= 1:
        raise LessonError(f"hidden_share is {hidden_share}; it must be from 0 to 1")
    if hidden is None:
        return
    files = sorted(hidden.glob("test_*.py"))
    if not files:
        raise LessonError(f"{hidden} has no test_*.py; hidden tests are written like public")
    known = {task.number for lesson in lessons for task in lesson.tasks}
    for path in files:
        if not known & set(TASK_MARK.findall(path.read_text("utf-8"))):
            raise LessonError(
                f"{path} would count for nothing: none of its tests has the mark of a task of "
                f"lesson {', '.join(str(lesson.number) for lesson in lessons)}, like "
                f'@pytest.mark.task("{min(known)}")'
            )


def write_autograder(
    lessons: Sequence[Lesson], folder: Path, hidden: Path | None = None, hidden_share: float = 0.5
) -> None:
    """Fill a folder with what Gradescope wants in the root of its zip."""
    check_hidden(lessons, hidden, hidden_share)
    write_bundle(lessons, folder)
    if hidden is not None:
        shutil.copytree(hidden, folder / "hidden", ignore=shutil.ignore_patterns("__pycache__"))
    configuration = {
        "lessons": [lesson.number for lesson in lessons],
        "hidden_share": hidden_share if hidden is not None else 0,
    }
    (folder / CONFIGURATION).write_text(json.dumps(configuration) + "\n", "utf-8")
    kernels = any(file.startswith("cuda/") for lesson in lessons for file in lesson.files)
    modules = imported(lessons)
    requirements = SMALL + (LARGE if "torch" in modules else [])
    requirements += SERVING if "fastapi" in modules else []
    quoted = " ".join(f"'{name}'" for name in requirements)
    setup = SETUP.format(packages="g++ ninja-build" if kernels else "", requirements=quoted)
    for name, text in (("setup.sh", setup), ("run_autograder", RUN)):
        path = folder / name
        path.write_text(text, "utf-8")
        path.chmod(0o755)


def imported(lessons: Sequence[Lesson]) -> set[str]:
    """All modules that the tests of these lessons import, and what those import."""
    files = [str(path) for lesson in lessons for path in lesson.folder.glob("test_*.py")]
    code = (
        "import runpy, sys; sys.path.insert(0, sys.argv[1])\n"
        "for file in sys.argv[2:]: runpy.run_path(file)\n"
        "print(*sys.modules)"
    )
    command = [sys.executable, "-c", code, str(ROOT / "tests"), *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise LessonError(f"the tests cannot be imported here: {done.stderr[-1000:]}")
    return set(done.stdout.split())


def make_zip(folder: Path) -> Path:
    """The folder as a zip beside it, with its contents in the root."""
    return Path(shutil.make_archive(str(folder), "zip", folder))
