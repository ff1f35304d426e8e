"""What a learner handed in: the files that are graded are taken out of it, and looked at.

Nothing else of a submission is ever put where Python, pytest or a compiler finds it.
"""

from __future__ import annotations

import ast
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from minipaged.course.lesson import Lesson


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


MOST_BYTES = 500_000
SAFE_MODULES = _words(
    "__future__ abc array bisect collections collections.abc contextlib copy dataclasses enum "
    "functools heapq itertools math numbers operator random statistics string textwrap time typing"
)
FORBIDDEN_NAMES = _words(
    "__import__ __builtins__ breakpoint compile delattr eval exec exit globals locals open "
    "quit setattr vars"
)
FORBIDDEN_ATTRIBUTES = _words(
    "__bases__ __builtins__ __class__ __closure__ __code__ __dict__ __func__ __getattribute__ "
    "__globals__ __loader__ __mro__ __reduce__ __self__ __spec__ __subclasses__ __traceback__ "
    "__wrapped__ _exit _getframe ag_frame cr_frame f_back f_builtins f_globals f_locals gi_frame "
    "modules os sys tb_frame with_traceback"
)


UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error)


def printable(text: str) -> str:
    """The text with "?" for what cannot be written in UTF-8, as may be in names of files."""
    return text.encode("utf-8", "replace").decode("utf-8")


def is_zip(path: Path) -> bool:
    """Whether it is called like one."""
    return path.suffix.lower() == ".zip"


def name_of(path: Path) -> str:
    """Whose submission it is."""
    return printable(path.stem if is_zip(path) else path.name)


class Submission:
    """A folder or a zip with a learner's files somewhere in it.

    Only those that are asked for are read: a small zip may hold very much.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = name_of(path)
        self.problem = ""
        self._files: dict[PurePosixPath, Path | zipfile.ZipInfo] = {}
        try:
            self._files = dict(self._list())
        except UNREADABLE as error:
            self._note(error)

    def _note(self, error: Exception) -> None:
        self.problem = printable(f"{self.path.name} cannot be read: {error}")

    def _list(self) -> Iterator[tuple[PurePosixPath, Path | zipfile.ZipInfo]]:
        """Source files, neither links nor large ones."""
        if self.path.is_dir():
            for path in sorted(self.path.rglob("*")):
                wanted = path.suffix in (".py", ".cuh") and not path.is_symlink()
                if wanted and path.is_file() and path.stat().st_size <= MOST_BYTES:
                    yield PurePosixPath(path.relative_to(self.path).as_posix()), path
            return
        with zipfile.ZipFile(self.path) as archive:
            for entry in archive.infolist():
                name = PurePosixPath(entry.filename)
                wanted = name.suffix in (".py", ".cuh") and "__MACOSX" not in name.parts
                if wanted and entry.file_size <= MOST_BYTES:
                    yield name, entry

    def _read(self, place: PurePosixPath) -> bytes | None:
        """What is in a file; None, and a problem, if it is damaged."""
        entry = self._files[place]
        try:
            if isinstance(entry, Path):
                return entry.read_bytes()
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise zipfile.BadZipFile(f"{place} is packed in a rare way; make a plain zip")
            with zipfile.ZipFile(self.path) as archive, archive.open(entry) as file:
                return file.read(MOST_BYTES)  # whatever its header says
        except UNREADABLE as error:
            self._note(error)
            return None

    def find(self, lesson: Lesson, file: str) -> bytes | None:
        """The learner's version of a file, or None.

        It is looked for in the lesson's folder, in those of other lessons, for two may share it,
        outside of the package, which in an assignment is emptied, and only then anywhere.
        """
        name = PurePosixPath(file).name
        found = [path for path in self._files if path.name == name and "stubs" not in path.parts]
        found.sort(key=lambda path: (len(path.parts), path))
        inside = [path for path in found if lesson.name in path.parts]
        taught = [path for path in found if "lessons" in path.parts]
        apart = [path for path in found if not {"minipaged", "cuda"} & set(path.parts)]
        for choice in (inside, taught, apart, found):
            if choice:
                return self._read(choice[0])
        return None

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
        text = path.read_text("utf-8-sig")  # some editors put a mark at the beginning
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
    """Imported modules, and names that reach beyond what a module is for.

    getattr may be called with a name that is written there or has one; as no text may name what
    is forbidden, it then reaches no further than an attribute.
    """
    plain = set()  # uses of getattr that are
    for node in ast.walk(tree):  # a call comes before what it calls
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
        elif isinstance(node, ast.Call) and len(node.args) >= 2:
            if isinstance(node.args[1], (ast.Name, ast.Constant)):
                plain.add(node.func)
        elif isinstance(node, ast.Name) and node.id == "getattr" and node not in plain:
            yield "name", "getattr"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            for part in node.value.split("."):
                if part in FORBIDDEN_ATTRIBUTES:
                    yield "attribute", part
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
