"""Grades submissions: what counts is decided here, where no learner code ever runs.

The list of tasks, at zero, comes first.  Each lesson of a submission is tested in a process of
its own (judge.py, asked by judges.py), and only a result that was expected, from a test that must
exist, changes it.  Learner code shares that process with the tests and could bend them.  So the
tests are given names drawn for this session, and among them are canaries, tests that must fail
under any honest conditions: where one passes, nothing that came out of the process is believed.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minipaged.course.bundle import CONFIGURATION, TASK_MARK, check_hidden, write_bundle
from minipaged.course.judges import Judges
from minipaged.course.lesson import ROOT, Lesson, LessonError, Task
from minipaged.course.submission import Submission, name_of, printable, suspicious

NOBODY = 65534
ENDED = (0, 1, 2, 5)
"""Exit codes of a pytest that came to its end, whatever the tests said."""

CANARIES = (
    "    raise AssertionError('this cannot be')",
    "    assert sum(range(3)) == 4, 'three numbers add up to three'",
    "    import pytest\n    with pytest.raises(ValueError):\n        len([])",
    "    from hypothesis import given, strategies\n"
    "    @given(n=strategies.integers(0, 5))\n"
    "    def check(n):\n        assert n < 5, 'a number is too large'\n"
    "    check()",
)


@dataclass(frozen=True)
class Limits:
    """Of the tests of one lesson of one submission.

    seconds: of a task's tests together, at most; a task may name less for itself.
    total: seconds of the whole process.
    memory: bytes of address space, not of RAM: the tests of lesson 12 map 16 GiB, and touch few.
    """

    seconds: int = 20
    total: int = 300
    memory: int = 32 << 30


@dataclass
class TaskGrade:
    """What a task of a submission is worth; zero until a test says otherwise.

    cases: every case that there must be, and what it failed with; None for one that passed.
    hidden: the same of the hidden tests.
    """

    lesson: Lesson
    task: Task
    cases: dict[str, str | None] = field(default_factory=dict)
    hidden: dict[str, str | None] = field(default_factory=dict)

    def points(self, hidden_share: float) -> tuple[float, float]:
        """Points of the public and of the hidden tests."""
        weight = hidden_share if self.hidden else 0.0
        public = self.task.share(self.cases.values()) * (1 - weight)
        hidden = self.task.share(self.hidden.values()) * weight
        return round(self.task.points * public, 2), round(self.task.points * hidden, 2)

    @property
    def feedback(self) -> str:
        """The first failure of the public tests, as the learner would see it at home."""
        return next((error for error in self.cases.values() if error), "")


@dataclass
class Grade:
    """Of one submission.  notes: what an instructor should know, such as signs of tampering."""

    name: str
    tasks: list[TaskGrade]
    hidden_share: float
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> float:
        """All points."""
        return round(sum(sum(grade.points(self.hidden_share)) for grade in self.tasks), 2)

    def failed(self, lesson: Lesson, why: str) -> None:
        """Nothing of this lesson counts."""
        self.notes.append(f"lesson {lesson.number}: {why}")
        for grade in self.tasks:
            if grade.lesson is lesson:
                for cases in (grade.cases, grade.hidden):
                    cases.update(dict.fromkeys(cases, why))


class Grader:
    """One session of grading, with a copy of the bundle and tests under names of its own.

    Use as a context manager.  hidden: a folder with more tests, marked with their tasks.
    seed: of the examples that Hypothesis draws, the same for all submissions.
    check_imports: refuse files that import what no solution needs; see submission.py.
    """

    def __init__(
        self,
        lessons: Sequence[Lesson],
        hidden: Path | None = None,
        hidden_share: float = 0.5,
        limits: Limits | None = None,
        seed: int | None = None,
        allowed: Sequence[str] = (),
        check_imports: bool = True,
    ) -> None:
        check_hidden(lessons, hidden, hidden_share)
        self.lessons = list(lessons)
        self.limits = limits or Limits()
        self.hidden_share = hidden_share
        self.seed = secrets.randbits(32) if seed is None else seed
        self._allowed, self._check_imports = allowed, check_imports
        self._hidden = hidden
        self.names: dict[str, str] = {}  # of a test in this session to its own name
        self._canaries: set[str] = set()
        self._folder = tempfile.TemporaryDirectory(prefix="minipaged-grading-")
        self.home = Path(self._folder.name)
        # Where the solutions could be read from is not among what learner code may open.
        self.bundle = self.home / "bundle"

    def __enter__(self) -> Grader:
        self.home.chmod(0o755)
        if (ROOT / CONFIGURATION).exists():  # this is an autograder: solutions are not in it
            ignored = shutil.ignore_patterns("__pycache__", "hidden", ".git", "venv")
            shutil.copytree(ROOT, self.bundle, ignore=ignored)
        else:
            write_bundle(self.lessons, self.bundle)
        for lesson in self.lessons:
            self._write_tests(lesson)
        self._judges = Judges(self.bundle, self._environment(self.home), self.home / "said")
        try:
            self._expected = {lesson.number: self._expect(lesson) for lesson in self.lessons}
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._judges.close()
        self._folder.cleanup()

    def _tests(self, lesson: Lesson) -> Path:
        return self.bundle / "graded" / lesson.name

    def _write_tests(self, lesson: Lesson) -> None:
        """The tests under new names, with canaries among them."""
        folder = self._tests(lesson)
        folder.mkdir(parents=True)
        sources = [(path, "") for path in sorted(lesson.folder.glob("test_*.py"))]
        if self._hidden is not None:
            sources += [(path, "hidden_") for path in sorted(self._hidden.glob("test_*.py"))]
        for path, prefix in sources:
            text, tasks = self._rename(path.read_text("utf-8"))
            for number, name in tasks:
                if number.split(".")[0] == str(lesson.number):
                    text += self._canary(number, name)
            (folder / f"test_{prefix}{path.name.removeprefix('test_')}").write_text(text, "utf-8")

    def _rename(self, text: str) -> tuple[str, list[tuple[str, str]]]:
        """The text with other names for its tests; a task and a test's name for each task."""
        lines = text.splitlines(keepends=True)
        tasks: dict[str, str] = {}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                new = f"{node.name}_{secrets.token_hex(4)}"
                self.names[new] = node.name
                line = lines[node.lineno - 1]
                lines[node.lineno - 1] = line.replace(f"def {node.name}(", f"def {new}(", 1)
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign)):
                for number in TASK_MARK.findall(ast.unparse(node)):
                    name = node.name if isinstance(node, ast.FunctionDef) else "test_life"
                    tasks.setdefault(number, name)
        return "".join(lines), list(tasks.items())

    def _canary(self, number: str, like: str) -> str:
        """Tests of this task that fail, called like one of its own."""
        text = "\n\nimport pytest\n"  # whatever the file itself calls it
        for body in random.sample(CANARIES, 3):
            name = f"{like}_{secrets.token_hex(4)}"
            self._canaries.add(name)
            text += f'\n\n@pytest.mark.task("{number}")\ndef {name}():\n{body}\n'
        return text

    def _expect(self, lesson: Lesson) -> dict[str, list[str]]:
        """Every case of every task, as it is where no learner code runs: on the stub.

        They are collected and not run, for here only their names are asked for.
        """
        with tempfile.TemporaryDirectory(dir=self.home) as name:
            scratch = Path(name)
            report = scratch / "report.json"
            own = self.bundle / "lessons" / lesson.name / "stubs"
            collect = ["--collect-only", f"--lesson-report={report}"]
            order = {
                "arguments": [*self._arguments(lesson, own), *collect],
                "environment": self._environment(scratch),
            }
            self._judges.run(order, scratch / "said", self.limits.total)
            said = (scratch / "said").read_text("utf-8", errors="replace")[-4000:]
            if not report.exists():
                raise LessonError(f"the tests of lesson {lesson.number} do not run: {said}")
            outcomes = json.loads(report.read_text("utf-8"))
        if outcomes["broken"]:
            raise LessonError(
                f"tests of lesson {lesson.number} are broken: {outcomes['broken'][0]}"
            )
        expected = {number: list(cases) for number, cases in outcomes["outcomes"].items()}
        if untested := [number for number, cases in expected.items() if not cases]:
            raise LessonError(
                f"no test of task {untested[0]} can be run here; is something not installed? "
                f"pytest says: {said}"
            )
        return expected

    def _arguments(self, lesson: Lesson, own: Path) -> list[str]:
        """For pytest; `own` is the folder of the lesson among those of all, or of its stubs."""
        others = [
            f"--also={file}={str(own).replace(lesson.name, other.name)}/{Path(file).name}"
            for other in self.lessons
            if other is not lesson
            for file in other.files
        ]
        return [
            *others,
            str(self._tests(lesson)),
            f"--lesson={lesson.number}",
            f"--own={own}",
            f"--rootdir={self.bundle}",
            f"-c={self.bundle / 'pyproject.toml'}",
            f"--hypothesis-seed={self.seed}",
            f"--task-seconds={self.limits.seconds}",
            "-q",
        ]

    def _environment(self, scratch: Path) -> dict[str, str]:
        """Nothing of the grader's own but what Python needs."""
        kept = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "CXX", "SYSTEMROOT")
        return {
            **{name: os.environ[name] for name in kept if name in os.environ},
            "PYTHONPATH": str(self.bundle),
            "HYPOTHESIS_PROFILE": "grading",
            "HYPOTHESIS_STORAGE_DIRECTORY": str(scratch / "examples"),
            "OMP_NUM_THREADS": "1",
            "MPLBACKEND": "agg",
            "MPLCONFIGDIR": str(scratch),
            "TORCH_EXTENSIONS_DIR": str(scratch / "extensions"),
            "HOME": str(scratch),
            "TMPDIR": str(scratch),
        }

    def blank(self, name: str) -> Grade:
        """The full list of tasks and cases, at zero."""
        grades = []
        for lesson in self.lessons:
            for task in lesson.tasks:
                grade = TaskGrade(lesson, task)
                for case in self._expected[lesson.number][task.number]:
                    if not self._is_canary(case):
                        cases = grade.hidden if case.startswith("test_hidden_") else grade.cases
                        cases[case] = "was not run"
                grades.append(grade)
        return Grade(name, grades, self.hidden_share)

    def _is_canary(self, case: str) -> bool:
        return case.partition("::")[2].partition("[")[0] in self._canaries

    def grade(self, path: Path) -> Grade:
        """Grade one submission, a folder or a zip."""
        submission = Submission(path)
        grade = self.blank(submission.name)
        with tempfile.TemporaryDirectory(dir=self.home) as name:
            home = Path(name)
            problems = submission.unpack(self.lessons, home / "own")
            if submission.problem:
                grade.notes.append(submission.problem)
            grade.notes += problems.values()
            begun = [x for x in self.lessons if any((home / "own" / x.name).iterdir())]
            # All are looked at before any is run, since each runs on the others.
            refused = {lesson.number: self._look_at(lesson, home, grade) for lesson in self.lessons}
            for lesson in self.lessons:
                if lesson in begun:
                    self._grade_lesson(lesson, home, grade, refused[lesson.number])
                else:
                    grade.failed(lesson, "none of its files was handed in")
        return grade

    def _look_at(self, lesson: Lesson, home: Path, grade: Grade) -> dict[str, str]:
        """Put the stub in the place of what is missing or refused; returns why, by file."""
        own = home / "own" / lesson.name
        refused: dict[str, str] = {}
        for file in lesson.files:
            path = own / Path(file).name
            stub = (self.bundle / "lessons" / lesson.name / "stubs" / path.name).read_text("utf-8")
            wrong = None
            if not path.exists():
                wrong = f"{path.name} was not handed in"
            elif self._check_imports:
                wrong = suspicious(path, stub, self._allowed)
                grade.notes += [f"lesson {lesson.number}: {wrong}"] if wrong else []
            if wrong:
                refused[file] = wrong
                path.write_text(stub, "utf-8")  # the other files may still be right
        return refused

    def _grade_lesson(
        self, lesson: Lesson, home: Path, grade: Grade, refused: dict[str, str]
    ) -> None:
        """Run the tests of one lesson, and believe what can be believed."""
        own = home / "own" / lesson.name
        results, broken, ended = self._run(lesson, own, home)
        passed_canaries = [case for case in results if self._is_canary(case) and not results[case]]
        expected = {case for cases in self._expected[lesson.number].values() for case in cases}
        if passed_canaries:
            return grade.failed(lesson, "a test that must fail has passed: the tests were bent")
        if unknown := set(results) - expected:
            return grade.failed(lesson, f"results of tests that do not exist: {sorted(unknown)[0]}")
        if not ended:
            said = (home / f"said-{lesson.number}").read_text("utf-8", errors="replace")
            lines = said.split("\n")
            telling = [line for line in lines if "Error" in line] or list(filter(None, lines))
            last = telling[-1].removeprefix("INTERNALERROR> ")[:200] if telling else "silently"
            grade.notes.append(f"lesson {lesson.number}: the tests were cut short: {last}")
        for task_grade in grade.tasks:
            if task_grade.lesson is not lesson:
                continue
            number = task_grade.task.number
            canaries = [c for c in self._expected[lesson.number][number] if self._is_canary(c)]
            for cases in (task_grade.cases, task_grade.hidden):
                for case in cases:
                    error = results.get(case, broken or "the tests ended before this one was run")
                    if error is None and not all(c in results for c in canaries):
                        error = "the tests of this task ended too early"
                    cases[case] = refused.get(task_grade.task.file, error)

    def _run(
        self, lesson: Lesson, own: Path, home: Path
    ) -> tuple[dict[str, str | None], str, bool]:
        """Results of the judge: of each case what failed, or None; why the tests could not be
        imported with the learner's file, if so; and whether the judge came to its end."""
        scratch = home / f"scratch-{lesson.number}"
        scratch.mkdir()
        for path in (home, own.parent, *own.parent.rglob("*")):
            path.chmod(0o755)
        user = unprivileged_user()
        if user is not None:
            os.chown(scratch, user, user)
        package = [str(self.bundle / name) for name in ("minipaged", "cuda", "tests")]
        readable = [*package, str(scratch), sys.prefix, sys.base_prefix, str(own.parent)]
        order = {
            "arguments": self._arguments(lesson, own),
            "environment": self._environment(scratch),
            "confined": {
                "user": user,
                "own": str(own.parent),
                "readable": [os.path.realpath(path) + "/" for path in readable],
                "seconds": self.limits.total,
                "memory": self.limits.memory,
            },
        }
        said = home / f"said-{lesson.number}"
        return _outcomes(self._judges.run(order, said, self.limits.total))


def _outcomes(messages: list[dict[str, Any]]) -> tuple[dict[str, str | None], str, bool]:
    results: dict[str, str | None] = {}
    broken, ended = "", False
    for message in messages:
        broken = broken or printable(str(message.get("broken", "")))
        if "case" in message:
            case = printable(str(message["case"]).rpartition("/")[2])
            text = printable(str(message["text"]))
            error = None if message["passed"] is True else text or "failed"
            # A case that failed once has failed, whatever is said of it later.
            results[case] = results.get(case) or error
        ended = ended or message.get("ended") in ENDED
    return results, broken, ended


@functools.cache
def unprivileged_user() -> int | None:
    """A user without rights to run learner code as, where this process may choose one."""
    if os.geteuid() != 0:
        return None
    try:
        command = [sys.executable, "-c", "import pytest"]
        subprocess.run(
            command,
            check=True,
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            capture_output=True,
            cwd="/",
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return NOBODY


def grade_all(grader: Grader, paths: Sequence[Path], jobs: int = 2) -> Iterator[Grade]:
    """Grade submissions side by side, in their order; one that breaks the grader is noted."""

    def one(path: Path) -> Grade:
        try:
            return grader.grade(path)
        except Exception as error:  # nobody else's grade may be lost
            grade = grader.blank(name_of(path))
            grade.notes.append(f"could not be graded: {error!r}")
            return grade

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(one, paths)
