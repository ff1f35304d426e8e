"""Pages of the book that are made from what is tested: API, paper map, tables of results."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from minipaged.course.lesson import ROOT, all_lessons
from minipaged.course.stubs import find_function, tomllib

ROOMS = {
    "request": "what is asked",
    "memory": "who owns which block",
    "attention": "attention over paged memory",
    "scheduling": "who runs in the next step",
    "decoding": "from logits to tokens",
    "models": "decoders and their files",
    "engine": "the loop",
    "serving": "the engine behind a server",
    "distributed": "one model on several ranks",
    "visual": "block maps and steppers",
    "evaluation": "the paper's figures",
    "course": "lessons and grading",
}
MAP = ROOT / "book" / "paper-map.toml"
RESULTS = ROOT / "book" / "results"


class DeadLinkError(Exception):
    """The paper map names something that is not there."""


def write_all(folder: Path) -> None:
    """Write every generated page, and take away those that nothing makes any more."""
    pages = {
        "paper-map.md": paper_map(),
        "lessons.md": lesson_table(),
        "registers.md": registers(),
        **{f"api/{room}.md": api_page(room) for room in ROOMS},
    }
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text("utf-8") != text:  # Sphinx looks at the time
            path.write_text(text, "utf-8")
    for path in folder.rglob("*.md"):
        if str(path.relative_to(folder)) not in pages:
            path.unlink()


# ------------------------------------------------------------------------------ the paper map


def paper_map() -> str:
    """The table of the paper's parts, a heading for each section."""
    lines = []
    lessons = {lesson.number: lesson for lesson in all_lessons()}
    entries = tomllib.loads(MAP.read_text("utf-8"))["places"]
    section = None
    for entry in entries:
        check_entry(entry, lessons.keys())
        if entry["section"] != section:
            section = entry["section"]
            lines += ["", f"## {section}", ""]
        lines += [f"**{entry['place']}** {entry['says']}", ""]
        parts = []
        if entry.get("code"):
            parts.append("code " + ", ".join(map(linked, entry["code"])))
        if entry.get("lessons"):
            links = [f"[{n}](/lessons/{lessons[n].name}/lesson.md)" for n in entry["lessons"]]
            parts.append("lesson " + ", ".join(links))
        if entry.get("tests"):
            parts.append("tests " + ", ".join(f"`{short(name)}`" for name in entry["tests"]))
        if entry.get("results"):
            links = [f"[{name}](/book/results.md#{anchor(name)})" for name in entry["results"]]
            parts.append("measured " + ", ".join(links))
        if entry.get("note"):
            parts.append(entry["note"])
        lines += [f"  {parts[0]}", *(f"  · {part}" for part in parts[1:]), ""] if parts else []
    return "\n".join(lines)


def linked(name: str) -> str:
    """A name in code; one of the package leads to its page of the API."""
    file, _, _ = name.partition("::")
    parts = Path(file).with_suffix("").parts
    if file.endswith(".py") and len(parts) > 2 and parts[1] in ROOMS:
        return f"[`{short(name)}`](#api-{'-'.join(parts[1:])})"
    return f"`{short(name)}`"


def short(name: str) -> str:
    """A file and a name in it, without the folders that they all begin with."""
    return name.removeprefix("minipaged/").removeprefix("tests/")


def anchor(result: str) -> str:
    """Where the results page has a figure."""
    return f"result-{result}"


def check_entry(entry: dict, lessons: object) -> None:
    """DeadLinkError names the first thing of an entry that does not exist."""
    place = entry["place"]
    for name in [*entry.get("code", ()), *entry.get("tests", ())]:
        check_name(name, place)
    for number in entry.get("lessons", ()):
        if number not in lessons:  # type: ignore[operator]
            raise DeadLinkError(f"{place}: there is no lesson {number}")
    for result in entry.get("results", ()):
        if not (RESULTS / f"{result}.json").exists():
            raise DeadLinkError(f"{place}: there is no result {result}")


def check_name(name: str, place: str) -> None:
    """A file of the project, or "file::function", "file::Class" or "file::Class.method"."""
    file, _, symbol = name.partition("::")
    path = ROOT / file
    if not path.exists():
        raise DeadLinkError(f"{place}: there is no file {file}")
    if not symbol:
        return
    text = path.read_text("utf-8")
    if path.suffix != ".py":
        if f" {symbol}(" not in text and f" {symbol} " not in text:
            raise DeadLinkError(f"{place}: there is no {symbol} in {file}")
        return
    tree = ast.parse(text)
    names = {node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    if symbol in names:
        return
    try:
        find_function(tree, symbol)
    except LookupError:
        raise DeadLinkError(f"{place}: there is no {symbol} in {file}") from None


# ------------------------------------------------------------------------------------ lessons


def lesson_table() -> str:
    """All lessons with what they ask for."""
    lines = ["| | lesson | paper | minutes | points | builds on |", "|---|---|---|---|---|---|"]
    for lesson in all_lessons():
        link = f"[{lesson.title}](/lessons/{lesson.name}/lesson.md)"
        requires = ", ".join(map(str, lesson.requires))
        points = lesson.points or ""
        lines.append(
            f"| {lesson.number:02d} | {link} | {lesson.sections} | {lesson.minutes} | {points} "
            f"| {requires} |"
        )
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------ results


def registers() -> str:
    """What nvcc gives each kernel, as `minipaged bench resources --json` stored it."""
    path = RESULTS / "registers.json"
    if not path.exists():
        return "No table of registers has been stored.\n"
    stored = json.loads(path.read_text("utf-8"))
    rows = stored["measurements"]
    architectures = sorted({row["architecture"] for row in rows})
    lines = [
        "| kernel | " + " | ".join(f"{a}: registers, spilled bytes" for a in architectures) + " |",
        "|---|" + "---|" * len(architectures),
    ]
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        cells = []
        for architecture in architectures:
            row = next(
                r for r in rows if (r["kernel"], r["architecture"]) == (kernel, architecture)
            )
            cells.append(f"{row['registers']}, {row['spill_bytes']}")
        lines.append(f"| `{kernel}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "```console", f"$ {stored['command']}", "```", ""])


# ---------------------------------------------------------------------------------------- API


def api_page(room: str) -> str:
    """The public names of a room: their signatures, and their docstrings as they stand."""
    lines = [f"# `minipaged.{room}`", "", f"{ROOMS[room].capitalize()}.", ""]
    for path in sorted((ROOT / "minipaged" / room).rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        entries = list(public(tree.body))
        if path.stem == "__init__" and not entries:
            continue
        target = "-".join(name.split(".")[1:])
        lines += [f"(api-{target})=", f"## `{name.removesuffix('.__init__')}`", ""]
        lines += described(ast.get_docstring(tree))
        for node in entries:
            lines += [f"### `{node.name}`", "", "```python", signature(node), "```", ""]
            lines += described(ast.get_docstring(node))
            for method in public(node.body) if isinstance(node, ast.ClassDef) else ():
                lines += ["```python", signature(method), "```", ""]
                lines += described(ast.get_docstring(method))
    return "\n".join(lines) + "\n"


def public(nodes: list[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    """Classes and functions that are there for others."""
    for node in nodes:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            yield node


def signature(node: ast.ClassDef | ast.FunctionDef) -> str:
    """How it is called."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                return f"class {node.name}({ast.unparse(method.args)})"
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    is_property = any("property" in ast.unparse(d) for d in node.decorator_list)
    if is_property:
        return f"{node.name}{returns}"
    return f"{node.name}({ast.unparse(node.args)}){returns}"


def described(docstring: str | None) -> list[str]:
    """A docstring as it stands: lines and indentation are part of it."""
    return ["```text", docstring, "```", ""] if docstring else []


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
