"""Notebooks from their sources: lesson.md is edited, lesson.ipynb is generated.

The source is a MyST notebook, text in which a change of one line is a difference of one line.
The generated file has no outputs, and cell ids that depend on the place of a cell alone, so
that it changes only where its source does.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from minipaged.course.lesson import Lesson


def source_of(lesson: Lesson) -> Path:
    """What is edited."""
    return lesson.folder / "lesson.md"


def notebook_of(lesson: Lesson) -> Path:
    """What is generated."""
    return lesson.folder / "lesson.ipynb"


def read_source(lesson: Lesson) -> Any:
    """The notebook that the source describes, as an nbformat node."""
    import jupytext

    notebook = jupytext.read(source_of(lesson), fmt="md:myst")
    for place, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{place}"
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def notebook_text(lesson: Lesson) -> str:
    """The text of the notebook's file."""
    import nbformat

    return str(nbformat.writes(read_source(lesson))) + "\n"


def write_notebook(lesson: Lesson) -> Path:
    """Generate the notebook; returns its file."""
    path = notebook_of(lesson)
    path.write_text(notebook_text(lesson), "utf-8")
    return path


def run_notebook(lesson: Lesson, seconds: int = 60) -> Any:
    """Run the notebook from top to bottom in a kernel; returns it with its outputs.

    Raises nbclient's CellExecutionError at the first cell that fails.
    """
    from nbclient import NotebookClient

    # On busy cores threads that wait for each other cost more than they do.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    notebook = read_source(lesson)
    resources = {"metadata": {"path": str(lesson.folder)}}
    NotebookClient(notebook, timeout=seconds, kernel_name="python3", resources=resources).execute()
    return notebook
