"""What a learner handed in: the files that are graded are taken out of it, and looked at.

Nothing else of a submission is ever put where Python, pytest or a compiler finds it.
"""

from __future__ import annotations

import ast
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from minipaged.course.lesson import Lesson


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


MOST_BYTES = 500_000
SAFE_MODULES = _words(
    "__future__ abc array bisect collections contextlib copy dataclasses enum functools heapq "
    "itertools math numbers operator random statistics string textwrap time typing"
)
FORBIDDEN_NAMES = _words(
    "__import__ __builtins__ breakpoint compile delattr eval exec exit globals input locals open "
    "quit setattr vars"
)
FORBIDDEN_ATTRIBUTES = _words(
    "__bases__ __builtins__ __class__ __closure__ __code__ __dict__ __func__ __getattribute__ "
    "__globals__ __loader__ __mro__ __reduce__ __self__ __spec__ __subclasses__ __traceback__ "
    "__wrapped__ _exit _getframe ag_frame cr_frame f_back f_builtins f_globals f_locals gi_frame "
    "modules os sys tb_frame with_traceback"
)


class Submission:
    """A folder or a zip with a learner's files somewhere in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.stem if path.suffix == ".zip" else path.name
        self.problem = ""
        self._files: dict[PurePosixPath, bytes] = {}
        try:
            self._files = dict(self._read())
        except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
            self.problem = f"{path.name} cannot be read: {error}"

    def _read(self) -> Iterator[tuple[PurePosixPath, bytes]]:
        """Source files, neither links nor large ones."""
        if self.path.is_dir():
            for path in sorted(self.path.rglob("*")):
                wanted = path.suffix in (".py", ".cuh") and not path.is_symlink()
                if wanted and path.is_file() and path.stat().st_size <= MOST_BYTES:
                    yield PurePosixPath(path.relative_to(self.path).as_posix()), path.read_bytes()
            return
        with zipfile.ZipFile(self.path) as archive:
            for entry in archive.infolist():
                name = PurePosixPath(entry.filename)
                wanted = name.suffix in (".py", ".cuh") and "__MACOSX" not in name.parts
                if wanted and entry.file_size <= MOST_BYTES:
                    yield name, archive.read(entry)

    def find(self, lesson: Lesson, file: str) -> bytes | None:
        """The learner's version of a file: the one in the lesson's folder, or else the only one."""
        name = PurePosixPath(file).name
        found = [path for path in self._files if path.name == name and "stubs" not in path.parts]
        inside = [path for path in found if lesson.name in path.parts]
        for choice in (inside, found):
            if len(choice) == 1:
                return self._files[choice[0]]
        shallow = sorted(inside or found, key=lambda path: len(path.parts))
        return self._files[shallow[0]] if shallow else None

    def unpack(self, lessons: Sequence[Lesson], folder: Path) -> dict[str, str]:
        """Write the graded files into a folder per lesson; returns what is wrong, by file."""
        problems = {}
        for lesson in lessons:
            own = folder / lesson.name
            own.mkdir(parents=True)
            for file in lesson.files:
                contents = self.find(lesson, file)
                name = f"{lesson.name}/{Path(file).name}"
                if contents is None:
                    problems[name] = f"{Path(file).name} is not in the submission"
                else:
                    (own / Path(file).name).write_bytes(contents)
        return problems


def suspicious(path: Path, stub: str, allowed: Sequence[str] = ()) -> str | None:
    """What in a learner's file no solution needs, in a sentence; None if there is nothing.

    stub: what the learner began with; whatever it uses may be used.
    allowed: modules that may be imported besides.
    """
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        return f"{path.name} is not text in UTF-8: {error}"
    if path.suffix != ".py":
        return _suspicious_kernel(path.name, text, stub)
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"{path.name} is not Python: {error}"
    given = set(_features(ast.parse(stub)))
    allowed_modules = SAFE_MODULES | set(allowed)
    for kind, name in _features(tree):
        if (kind, name) in given or (kind == "module" and name in allowed_modules):
            continue
        if kind == "module":
            return (
                f"{path.name} imports {name}; a solution needs no more than what the stub imports "
                f"and the plain modules of Python, such as math and itertools"
            )
        return f"{path.name} uses {name}, which no solution needs"
    return None


def _features(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Imported modules, and names that reach beyond what a module is for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield "module", alias.name
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if module in SAFE_MODULES:
                yield "module", module
            else:
                for alias in node.names:
                    yield "module", f"{module}.{alias.name}"
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            yield "name", node.id
        elif isinstance(node, ast.Name) and node.id == "getattr":
            yield "name", "getattr"
        elif isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_ATTRIBUTES:
            yield "attribute", node.attr


def _suspicious_kernel(name: str, text: str, stub: str) -> str | None:
    pattern = (
        r"#\s*(?:include|pragma|define|undef)[^\n]*|\b(?:asm|__asm__|extern|system|fork|exec\w*)\b"
    )
    given = {re.sub(r"\s", "", match) for match in re.findall(pattern, stub)}
    # A backslash or another spelling of "#" could hide a directive.
    for match in [*re.findall(pattern, text), *re.findall(r"\\\n|\?\?=|%:", text)]:
        if re.sub(r"\s", "", match) not in given:
            return f"{name} has {match.strip()!r}, which no solution needs"
    return None
