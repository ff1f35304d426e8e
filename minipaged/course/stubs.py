"""Stubs: the reference with the parts left out that a lesson asks for.

The reference is the only source.  In a Python file the body of a named function, after its
docstring, becomes a NotImplementedError that names the task; in a CUDA file the body between
the braces, or the end of it, becomes a call that fails with the same words.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

from minipaged.course.lesson import ROOT, Lesson, LessonError, Task, tomllib

STILL_OPEN = "is still to be written"
OPEN_TASK = f"Task {{number}}: {{name}} {STILL_OPEN}"


def stub_of(lesson: Lesson, file: str) -> str:
    """The learner's first version of a file, with all tasks of the lesson open."""
    return with_open_tasks(file, lesson.tasks)


def with_open_tasks(file: str, tasks: Iterable[Task]) -> str:
    """A file of the reference without what those of these tasks that are in it ask for."""
    text = (ROOT / file).read_text("utf-8")
    for task in tasks:
        if task.file == file:
            text = open_task(text, task)
    return text


def open_task(text: str, task: Task) -> str:
    """A file's text without what the task asks for."""
    for bug in task.plant:
        text = plant(text, read_bug(bug))
    for name in task.empty:
        try:
            empty = _empty_python if task.is_python else _empty_cuda
            text = empty(text, name, task)
        except LookupError as error:
            raise LessonError(
                f"task {task.number} empties {name}, which is not in {task.file}: {error}"
            ) from error
    return text


def _empty_python(text: str, name: str, task: Task) -> str:
    node = find_function(ast.parse(text), name)
    given = node.body[: -len(statements(node))]  # the docstring, if there is one
    before = given[-1].end_lineno if given else node.body[0].lineno - 1
    lines = text.splitlines(keepends=True)
    indent = " " * (node.col_offset + 4)
    message = OPEN_TASK.format(number=task.number, name=name)
    line = f'{indent}raise NotImplementedError("{message}")\n'
    return "".join([*lines[:before], line, *lines[node.end_lineno :]])


def statements(node: ast.FunctionDef) -> list[ast.stmt]:
    """The body of a function without its docstring."""
    first = node.body[0]
    described = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return node.body[1:] if described else node.body


def find_function(tree: ast.Module, name: str) -> ast.FunctionDef:
    """The function or method of this qualified name; LookupError if there is none."""
    nodes: list[ast.stmt] = tree.body
    *classes, function = name.split(".")
    for part in classes:
        inner = [n for n in nodes if isinstance(n, ast.ClassDef) and n.name == part]
        if not inner:
            raise LookupError(f"no class {part}")
        nodes = inner[0].body
    for node in nodes:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return node
    raise LookupError(f"no function {function}")


def _empty_cuda(text: str, name: str, task: Task) -> str:
    start, end = cuda_part(text, name)
    message = OPEN_TASK.format(number=task.number, name=name.partition(" from ")[0])
    last = text[text.rindex("\n", 0, end) + 1 : end]
    indent = last[: len(last) - len(last.lstrip())]
    return f'{text[:start]}{indent}    not_implemented("{message}");\n{indent}{text[end:]}'


def cuda_part(text: str, name: str) -> tuple[int, int]:
    """Where what is asked for begins and ends: a body, or all of it from a line on."""
    name, _, first = name.partition(" from ")
    start, end = cuda_body(text, name)
    if not first:
        return start + 1, end
    place = text.find(first, start, end)
    if place < 0:
        raise LookupError(f"no {first!r} in {name}")
    return text.rindex("\n", start, place) + 1, end


def cuda_body(text: str, name: str) -> tuple[int, int]:
    """Where the body of a function begins, behind its brace, and where its last brace stands."""
    place = text.find(f" {name}(")
    if place < 0:
        raise LookupError(f"no function {name}")
    start = text.index("{", text.index(")", place)) + 1
    depth, at = 1, start
    while depth:
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        at += 1
    return start, at - 1


def reference_bodies(lesson: Lesson) -> Iterator[tuple[Task, str, str]]:
    """What a lesson asks for: the task, the function's name, and its body in the reference."""
    for task in lesson.tasks:
        text = (ROOT / task.file).read_text("utf-8")
        lines = text.splitlines(keepends=True)
        for name, function in zip(task.empty, task.functions, strict=True):
            if task.is_python:
                body = statements(find_function(ast.parse(text), name))
                yield task, function, "".join(lines[body[0].lineno - 1 : body[-1].end_lineno])
            else:
                start, end = cuda_part(text, name)
                yield task, function, text[start:end]


def read_bug(name: str) -> dict:
    """A planted bug, from its file in tests/planted_bugs."""
    path = ROOT / "tests" / "planted_bugs" / f"{name}.toml"
    if not path.exists():
        raise LessonError(f"there is no planted bug {name}: found no {path}")
    return tomllib.loads(path.read_text("utf-8"))


def plant(text: str, bug: dict) -> str:
    """A file's text with the edits of a bug, or of a variant; each old text must be there once.

    A bug has one edit, `old` and `new`, or a list `edits` of such pairs.
    """
    for edit in bug.get("edits", [bug]):
        if text.count(edit["old"]) != 1:
            raise LessonError(f"{bug['file']} has changed; mend the planted bug {bug['title']!r}")
        text = text.replace(edit["old"], edit["new"])
    return text


def mutants(lesson: Lesson) -> tuple[dict[str, dict], dict[str, dict]]:
    """The planted bugs of a lesson and the correct solutions of another shape, by name.

    Its mutants.toml has them; a bug that has no file there is one of the whole project.  Each bug
    says in `caught_by` which test of the lesson it fails.
    """
    path = lesson.folder / "mutants.toml"
    own = tomllib.loads(path.read_text("utf-8")) if path.exists() else {}
    bugs = [
        bug if "file" in bug else {**read_bug(bug["name"]), **bug} for bug in own.get("bugs", ())
    ]
    variants = own.get("variants", ())
    return {bug["name"]: bug for bug in bugs}, {variant["name"]: variant for variant in variants}


def write_solution(lesson: Lesson, folder: Path, change: dict | None = None) -> None:
    """The lesson's files as the reference has them, with a bug or a variant in one of them."""
    for file in lesson.files:
        text = (ROOT / file).read_text("utf-8")
        if change is not None and change["file"] == file:
            text = plant(text, change)
        (folder / Path(file).name).write_text(text, "utf-8")


def write_stubs(lesson: Lesson, folder: Path | None = None) -> list[Path]:
    """Write the stubs of a lesson, by default where they belong; returns their files."""
    written = []
    for file in lesson.files:
        path = (folder or lesson.folder / "stubs") / Path(file).name
        path.parent.mkdir(exist_ok=True)
        path.write_text(stub_of(lesson, file), "utf-8")
        written.append(path)
    return written
