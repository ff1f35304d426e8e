"""The learner's files in the place of modules of the package.

An import finder stands before all others and answers the import of a substituted module with
another file, so that everything that imports it, the engine included, runs on that.  For a
CUDA file the kernels are compiled from a copy of cuda/ that has the learner's file in it.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from minipaged.course.lesson import ROOT, Lesson, LessonError, find_lesson

ASSIGNMENT = "assignment.json"
"""In the root of a bundle: the numbers of its lessons."""

Files = Mapping[str, Path]
"""Files of the package, relative to the project, and what takes their place."""


KEPT = ("minipaged.course", "minipaged.cli", "minipaged.errors")
"""What no lesson replaces, and who has it already goes on with it."""


class LessonFinder(importlib.abc.MetaPathFinder):
    """Answers the import of some modules with other files."""

    def __init__(self, files: Files) -> None:
        self.files = dict(files)
        self.modules = {
            file.removesuffix(".py").replace("/", "."): path.resolve()
            for file, path in files.items()
            if file.endswith(".py")
        }

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """Where a substituted module is; None leaves the others to the usual finders."""
        if fullname not in self.modules:
            return None
        return importlib.util.spec_from_file_location(fullname, self.modules[fullname])


def substitute(files: Files) -> None:
    """From now on these files are imported in the place of the package's.

    What was imported of the package before is forgotten, so that it is imported anew; objects
    that were made before keep their old classes.
    """
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, LessonFinder)]
    for name in [name for name in sys.modules if name.startswith("minipaged.")]:
        if not name.startswith(KEPT):
            del sys.modules[name]
            parent, _, child = name.rpartition(".")
            if parent in sys.modules:
                vars(sys.modules[parent]).pop(child, None)
    if not files:
        return
    sys.meta_path.insert(0, LessonFinder(files))
    kernels = {file: path for file, path in files.items() if file.startswith("cuda/")}
    if kernels:
        from minipaged.attention import build

        build.SOURCES = overlay(kernels) / "cuda"


def overlay(kernels: Files) -> Path:
    """A folder with a copy of cuda/ that has these files in it.

    It is named after its content and stays, so that all processes with that content share it.
    What somebody removed of it is put back.  LessonError if it is another user's, who could
    change what is compiled.
    """
    whole = {str(p.relative_to(ROOT)): p for p in (ROOT / "cuda").rglob("*") if p.is_file()}
    contents = {file: path.read_bytes() for file, path in sorted({**whole, **kernels}.items())}
    digest = hashlib.blake2b(digest_size=8)
    for file, content in contents.items():
        digest.update(f"{file} {len(content)} ".encode() + content)
    name = f"minipaged-cuda-{os.getuid()}-{digest.hexdigest()}"
    folder = Path(tempfile.gettempdir()) / name
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():
        raise LessonError(
            f"{folder} belongs to another user; remove it, or set TMPDIR to a folder of your own"
        )
    for file, content in contents.items():
        place = folder / file
        if not place.exists() or place.read_bytes() != content:
            place.parent.mkdir(parents=True, exist_ok=True)
            # Whole at once, for another process may be reading it.
            filled = place.with_name(f"{place.name}.{os.getpid()}")
            filled.write_bytes(content)
            filled.replace(place)
    return folder


def substituted() -> dict[str, Path]:
    """What is substituted now."""
    for finder in sys.meta_path:
        if isinstance(finder, LessonFinder):
            return finder.files
    return {}


def own_files(lessons: Sequence[Lesson]) -> dict[str, Path]:
    """The learner's files of these lessons; where two write the same, the later lesson's.

    In an assignment those of its other lessons stand in for the package's as well, for there the
    package has nothing better.  LessonError names the first one that is not there.
    """
    files = {}
    others = [find_lesson(n) for n in assigned() if n not in {ours.number for ours in lessons}]
    for lesson in [*others, *lessons]:
        for file in lesson.files:
            path = own_place(lesson, file)
            if not path.exists():
                raise LessonError(
                    f"lesson {lesson.number} has not begun: found no {path}; "
                    f"`minipaged lesson start {lesson.number}` makes it"
                )
            files[file] = path
    return files


def own_place(lesson: Lesson, file: str) -> Path:
    """Where the learner's file is, or is to be: in the lesson's folder.

    One file serves all lessons of an assignment that ask for it, wherever it lies.
    """
    others = [other for other in map(find_lesson, assigned()) if file in other.files]
    places = [home.own_file(file) for home in (lesson, *others)]
    return next((place for place in places if place.exists()), places[0])


def whose(thing: object) -> str:
    """Whether a class, or the class of an object, is the learner's or the reference's."""
    kind = thing if isinstance(thing, type) else type(thing)
    path = Path(str(sys.modules[kind.__module__].__file__))
    if path in [own.resolve() for own in substituted().values()]:
        return f"yours, from {path.parent.name}/{path.name}"
    return f"the reference's, from {path.name}"


def assigned() -> list[int]:
    """The lessons of the assignment that this folder is; none in the whole project."""
    path = ROOT / ASSIGNMENT
    return list(json.loads(path.read_text("utf-8"))) if path.exists() else []


def use(*numbers: int) -> None:
    """Run on one's own modules of these lessons from now on; with none, on the reference.

    For notebooks: call it again after a change, then import again what is used.  A lesson that
    has not begun runs on the reference, and that is said.
    """
    files: dict[str, Path] = {}
    for number in numbers:
        lesson = find_lesson(number)
        try:
            files |= own_files([lesson])
        except LessonError:
            print(
                f"Lesson {number} runs on the reference: you have not begun it. "
                f"`minipaged lesson start {number}` makes your files."
            )
    substitute(files)
    for file, path in files.items():
        print(f"{file} is yours: {path.parent.name}/{path.name}")
