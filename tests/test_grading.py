"""The grader gives what was earned, and nothing to those who bend the tests instead.

Attacks run with the check of imports switched off, so that what stands behind it is tested; that
the check alone would have refused them is asserted as well.
"""

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import zipfile

import pytest
from command import LEAN
from hypothesis import settings

from minipaged.cli.course import found_submissions
from minipaged.course.bundle import write_autograder, write_bundle
from minipaged.course.grading import Grader, Limits, grade_all, unprivileged_user
from minipaged.course.judges import Judges
from minipaged.course.lesson import ROOT, LessonError, all_lessons, find_lesson
from minipaged.course.reports import gradescope_results, summary, write_csv
from minipaged.course.stubs import mutants, plant, stub_of, write_solution
from minipaged.course.submission import Submission, suspicious

FILE = "minipaged/memory/block_allocator.py"
LESSON = find_lesson(3)
REFERENCE = (ROOT / FILE).read_text("utf-8")
STUB = stub_of(LESSON, FILE)

SECRET = "nobody may know this"
HIDDEN = '''
"""Hidden tests of lesson 3."""
import pytest
from minipaged.memory.block_allocator import BlockAllocator

@pytest.mark.task("3.1")
def test_a_large_pool():
    pool = BlockAllocator(1000)
    assert len({pool.allocate() for _ in range(1000)}) == 1000
'''


@pytest.fixture(scope="module")
def hidden(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hidden")
    (folder / "test_more.py").write_text(HIDDEN)
    return folder


@pytest.fixture(scope="module")
def grader(hidden):
    limits = Limits(seconds=3, total=40, memory=8 << 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INSTRUCTORS_PASSWORD", SECRET)
        with Grader([LESSON], hidden, limits=limits, seed=7, check_imports=False) as grader:
            yield grader


def submission(folder, text, name="block_allocator.py"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder


def points(grade):
    return {g.task.number: sum(g.points(grade.hidden_share)) for g in grade.tasks}


def test_the_reference_has_all_points(grader, tmp_path):
    grade = grader.grade(submission(tmp_path / "anna", REFERENCE))
    assert points(grade) == {"3.1": 20, "3.2": 20, "3.3": 20, "3.4": 40}
    assert grade.total == 100
    assert grade.notes == []


THOROUGH = settings.default == settings.get_profile("thorough")
FEW_EXAMPLES = """
settings.register_profile("few", settings.default, max_examples=10)
settings.load_profile("few")
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_references_of_lessons_have_all_points(tmp_path):
    """Of those whose files import and define most; the thorough profile grades them all.

    What is refused or not is what a solution does in its first examples, so that a few are enough.
    """
    lessons = [find_lesson(number) for number in (range(1, 19) if THOROUGH else (1, 4, 15, 18))]
    for lesson in lessons:
        (tmp_path / lesson.name).mkdir()
        write_solution(lesson, tmp_path / lesson.name)
    with Grader(lessons, seed=7) as grader:
        if not THOROUGH:
            with open(grader.bundle / "conftest.py", "a") as conftest:
                conftest.write(FEW_EXAMPLES)
        grade = grader.grade(tmp_path)
    expected = {task.number: task.points for lesson in lessons for task in lesson.tasks}
    assert points(grade) == expected, [g.feedback for g in grade.tasks]
    assert grade.notes == []


def test_the_tests_of_lesson_12_have_the_address_space_that_they_map():
    assert Limits().memory > 16 << 30


def test_what_python_does_for_honest_code_is_allowed(grader, tmp_path):
    text = REFERENCE.replace(
        "from __future__ import annotations\n",
        """from __future__ import annotations
import abc, collections.abc, dataclasses, functools, statistics, typing, wave
import minipaged.evaluation
class Pair(typing.NamedTuple):
    "Two."
    a: int = 1
    b: int = 2
class Base(abc.ABC):
    @abc.abstractmethod
    @functools.wraps(len)
    def f(self): ...
@dataclasses.dataclass(frozen=True, slots=True)
class Point(Base):
    x: int = 0
    def f(self): ...
""",
    )
    assert text != REFERENCE
    assert grader.grade(submission(tmp_path / "anna", text)).total == 100


def test_the_stub_has_none_and_is_told_why(grader, tmp_path):
    grade = grader.grade(submission(tmp_path / "ben", STUB))
    assert grade.total == 0
    assert "Task 3.1: BlockAllocator.allocate is still to be written" in grade.tasks[0].feedback


def test_a_mistake_costs_its_task_and_is_shown(grader, tmp_path):
    bugs, _ = mutants(LESSON)
    text = plant(REFERENCE, bugs["sharer_not_counted"])
    grade = grader.grade(submission(tmp_path / "cleo", text))
    assert points(grade) == {"3.1": 20, "3.2": 20, "3.3": 0, "3.4": 0}
    assert "pool.share(" in grade.tasks[2].feedback


def test_a_property_is_paid_by_the_bugs_it_catches(grader, tmp_path):
    weak = REFERENCE.replace(
        'assert count == held, f"block {block}: reference count {count}, in {held} tables"', "pass"
    )
    assert weak != REFERENCE
    grade = grader.grade(submission(tmp_path / "dora", weak))
    missed = [case for case, error in grade.tasks[3].cases.items() if error]
    assert len(missed) >= 2
    share = 1 - len(missed) / len(grade.tasks[3].cases)
    assert points(grade)["3.4"] == pytest.approx(40 * share, abs=0.01)


def test_learner_code_has_neither_the_instructors_environment_nor_the_rights(grader, tmp_path):
    assert os.environ["INSTRUCTORS_PASSWORD"] == SECRET
    text = f"""
import os
told = repr(os.environ)
for process in ("self", os.getppid()):
    try:
        told += open(f"/proc/{{process}}/environ").read()
    except OSError:
        pass
assert {SECRET!r} not in told
assert {unprivileged_user()} is None or 0 not in (os.getuid(), os.getgid(), *os.getgroups())
"""
    assert grader.grade(submission(tmp_path / "anna", REFERENCE + text)).total == 100


def test_a_death_of_the_process_that_is_forked_costs_nobody_a_grade(grader, tmp_path):
    server = grader._judges._server
    server.kill()
    server.wait()
    assert grader.grade(submission(tmp_path / "anna", REFERENCE)).total == 100


def test_what_cuts_the_tests_short_is_said(grader, tmp_path):
    text = f"""{STUB}
import _pytest.nodes
_pytest.nodes.Node._repr_failure_py = lambda *_, **__: 1 / 0
"""
    grade = grader.grade(submission(tmp_path / "mallory", text))
    assert grade.total == 0
    assert grade.notes == [
        "lesson 3: the tests were cut short: ZeroDivisionError: division by zero"
    ]


def test_why_there_can_be_no_judge_is_said(tmp_path):
    environment = {"PYTHONPATH": str(tmp_path)}
    (tmp_path / "torch.py").write_text("raise ValueError('not today')")
    judges = Judges(tmp_path, environment, tmp_path / "complaints")
    with pytest.raises(LessonError, match=r"(?s)that judges has ended: .*not today"):
        judges.run({}, tmp_path / "said", seconds=60)
    judges.close()


def test_what_only_hidden_tests_find(grader, tmp_path):
    text = REFERENCE.replace(
        "self.check_available(1)\n",
        "self.check_available(1)\n        assert self.num_blocks < 500\n",
    )
    grade = grader.grade(submission(tmp_path / "emil", text))
    assert points(grade)["3.1"] == 10
    results = gradescope_results(grade)
    hidden_test = next(test for test in results["tests"] if "hidden" in test["name"])
    assert (hidden_test["score"], hidden_test["max_score"]) == (0, 10)
    assert hidden_test["visibility"] == "after_published"
    assert "500" not in json.dumps(results), "what a hidden test says is not told"
    assert sum(test["max_score"] for test in results["tests"]) == 100


# Each begins with a stub, in which nothing is solved, and wants points all the same.
ATTACKS = {
    "leaves with success": "import os; os._exit(0)",
    "leaves in the first test": """
import os
BlockAllocator.allocate = lambda self: os._exit(0)
""",
    "asks pytest to stop": """
import pytest
BlockAllocator.allocate = lambda self: pytest.exit("all is well", 0)
""",
    "skips every test": """
import pytest
for name in ("allocate", "free", "share", "check_integrity", "check_available"):
    setattr(BlockAllocator, name, lambda *_: pytest.skip("not today"))
""",
    "patches pytest's reports": """
from _pytest.reports import TestReport
make = TestReport.from_item_and_call
def passes(item, call):
    report = make(item, call)
    report.outcome, report.longrepr = "passed", None
    return report
TestReport.from_item_and_call = passes
""",
    "patches how tests are called": """
import _pytest.python
_pytest.python.Function.runtest = lambda self: None
""",
    "patches the plugin of the lessons": """
import minipaged.course.plugin as plugin
plugin.LessonRun.pytest_runtest_call = lambda self, item: iter([None])
plugin.pytest.CallInfo.from_call = classmethod(
    lambda cls, func, when, reraise=None: cls(None, None, 0, 0, 0, when, _ispytest=True)
)
""",
    "patches assertions away": """
import _pytest.assertion.rewrite, hypothesis.core, pytest, contextlib, builtins
class Never(Exception):
    def __new__(cls, *args): return SystemExit(0)
builtins.AssertionError = Never
pytest.raises = lambda *args, **kwargs: contextlib.nullcontext()
""",
    "throws the tests away": """
import sys
try:
    raise ValueError
except ValueError as error:
    frame = error.__traceback__.tb_frame
    while frame:
        for value in list(frame.f_locals.values()):
            if hasattr(value, "items") and hasattr(value, "testscollected"):
                BlockAllocator.session = value
        frame = frame.f_back
def allocate(self):
    type(self).session.items.clear()
BlockAllocator.allocate = allocate
""",
    "forges reports without the key": """
import json, os
for case in range(100):
    line = json.dumps({"case": "test_block_allocator.py::test_x", "passed": True, "text": ""})
    for fd in range(3, 40):
        try: os.write(fd, line.encode() + b"\\n")
        except OSError: pass
os._exit(0)
""",
    "steals the key and reports success": """
import json, os
def allocate(self):
    try: raise ValueError
    except ValueError as error: frame = error.__traceback__.tb_frame
    sender = items = None
    while frame:
        for value in list(frame.f_locals.values()):
            sender = value if hasattr(value, "_key") and hasattr(value, "_send") else sender
            items = getattr(value, "items", items) if hasattr(value, "testscollected") else items
        frame = frame.f_back
    for item in items:
        sender._send({"case": item.nodeid, "passed": True, "text": ""})
    sender._send({"ended": 0})
    os._exit(0)
BlockAllocator.allocate = allocate
""",
    "imports the reference": f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("solution", {str(ROOT / FILE)!r})
solution = importlib.util.module_from_spec(spec)
spec.loader.exec_module(solution)
BlockAllocator = solution.BlockAllocator
""",
    "opens the reference": f"""
exec(open({str(ROOT / FILE)!r}).read())
""",
    "reads the tests": """
import pathlib, os
text = "".join(path.read_text() for path in pathlib.Path("graded").rglob("test_*.py"))
assert "test_a_large_pool" in text
""",
    "starts a shell": """
import subprocess
subprocess.run(["cp", "-r", "/", "/tmp/loot"])
""",
    "starts a thread that waits": """
import threading, time
threading.Thread(target=lambda: (time.sleep(1), __import__("os")._exit(0))).start()
""",
    "writes a conftest": """
import pathlib
pathlib.Path("conftest.py").write_text("def pytest_runtest_call(item): pass")
""",
    "loops for ever": """
def allocate(self):
    while True: pass
BlockAllocator.allocate = allocate
""",
    "eats the memory": """
hoard = []
while True: hoard.append(bytearray(100_000_000))
""",
    "equals everything": """
class Anything(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
for name in ("allocate", "free", "share", "check_integrity", "check_available", "ref_count"):
    setattr(BlockAllocator, name, lambda *_: Anything())
""",
    "raises at import": "raise SystemExit(0)",
}


# What each event would do for a learner who hides it behind an import, or behind a library.
HIDDEN_EVENTS = {
    "open": f"""
import sys
sys.path.insert(0, {str(ROOT / "minipaged/memory")!r})
sys.path_importer_cache.clear()
from importlib.machinery import SourceFileLoader
SourceFileLoader("other", {str(ROOT / FILE)!r}).load_module()
""",
    "subprocess.Popen": """
import importlib.util, subprocess
if __name__ == "again":
    subprocess.run(["true"])
spec = importlib.util.spec_from_file_location("again", __file__)
spec.loader.exec_module(importlib.util.module_from_spec(spec))
""",
    "os.system": """
import importlib._bootstrap, os
importlib._bootstrap._call_with_frames_removed(os.system, "true")
""",
    "object.__setattr__": """
import functools, json
functools.update_wrapper(json.dumps, lambda *_: None, assigned=("__code__",), updated=())
""",
    "marshal.loads": """
import marshal
marshal.loads(b"N")
""",
    "os.listdir": """
import os
os.listdir("graded")
""",
    "os.mkdir": """
import os, sys
class Name:
    def __repr__(self):
        os.mkdir("loot")
        return "a name"
sys.audit("os.system", Name())
""",
}


@pytest.mark.parametrize("event", HIDDEN_EVENTS)
def test_what_is_hidden_behind_an_import_is_refused(grader, tmp_path, event):
    grade = grader.grade(submission(tmp_path / "mallory", f"{REFERENCE}\n{HIDDEN_EVENTS[event]}"))
    assert grade.total == 0, "it would have had all"
    assert f"learner code may not {event} " in grade.tasks[0].feedback


def test_the_reference_cannot_be_imported_from_its_folder(grader, tmp_path):
    text = f"""
import sys
sys.path.insert(0, {str(ROOT / "minipaged/memory")!r})
from block_allocator import *
"""
    grade = grader.grade(submission(tmp_path / "mallory", text))
    assert grade.total == 0
    assert "No module named 'block_allocator'" in grade.tasks[0].feedback


# What ends only at a limit may be given a low one: an honest solution would still be far from it.
LIMITED = {
    "loops for ever": {"seconds": 1},
    "equals everything": {"seconds": 1},
    "eats the memory": {"memory": 4 << 30},  # of which a torch for CUDA takes three by itself
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_earns_nothing(grader, tmp_path, name, monkeypatch):
    limits = dataclasses.replace(grader.limits, **LIMITED.get(name, {}))
    monkeypatch.setattr(grader, "limits", limits)
    grade = grader.grade(submission(tmp_path / "mallory", f"{STUB}\n{ATTACKS[name]}"))
    assert grade.total == 0, f"{points(grade)}, {grade.notes}"
    assert len(grade.tasks) == 4, "the list of tasks is complete"


# What is no trick in its means, but does not work, is left to the tests.
PLAIN = {"loops for ever", "eats the memory", "raises at import"}


@pytest.mark.parametrize("name", sorted(ATTACKS.keys() - PLAIN))
def test_an_attack_is_refused_at_the_door(tmp_path, name):
    folder = submission(tmp_path / "mallory", f"{STUB}\n{ATTACKS[name]}")
    said = suspicious(folder / "block_allocator.py", STUB)
    assert said is not None
    assert "which no solution needs" in said or "a solution needs no more" in said


@pytest.mark.parametrize("lesson", all_lessons(), ids=lambda lesson: lesson.name)
def test_solutions_are_not_refused(tmp_path, lesson):
    for change in (None, *mutants(lesson)[1].values()):
        for file in lesson.files:
            text = (ROOT / file).read_text("utf-8")
            text = plant(text, change) if change and change["file"] == file else text
            folder = submission(tmp_path, text, file.rpartition("/")[2])
            assert suspicious(folder / file.rpartition("/")[2], stub_of(lesson, file)) is None


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("\ufeffx = 1", False),
        ("from collections.abc import Iterator", False),
        ("import collections.abc", False),
        ("def f(p, name): return getattr(p, name, 0)", False),
        ("def f(input): return input + 1", False),
        ("x = getattr(1, '_ended', None)", False),
        ("x = getattr(f, '__globals__')", True),
        ("name = '__globals__'; x = getattr(f, name)", True),
        ("x = getattr(f, '__glo' + 'bals__')", True),
        ("x = getattr(*pair)", True),
        ("reach = getattr; x = reach(f, name)", True),
        ("import operator; x = operator.attrgetter('a.__globals__')(f)", True),
    ],
)
def test_what_the_door_lets_in(tmp_path, text, refused):
    path = tmp_path / "block_allocator.py"
    path.write_text(text, "utf-8")
    assert (suspicious(path, STUB) is not None) == refused


def test_other_files_of_a_submission_are_left_where_they_are(grader, tmp_path):
    folder = submission(tmp_path / "oscar", STUB)
    for name in ("conftest.py", "pytest.py", "sitecustomize.py", "hypothesis.py", "torch.py"):
        (folder / name).write_text("import os; os._exit(0)")
    grade = grader.grade(folder)
    assert grade.total == 0
    assert "still to be written" in grade.tasks[0].feedback, "the tests ran as ever"


def test_a_link_is_no_submission(grader, tmp_path):
    (tmp_path / "peggy").mkdir()
    os.symlink(ROOT / FILE, tmp_path / "peggy" / "block_allocator.py")
    grade = grader.grade(tmp_path / "peggy")
    assert grade.total == 0
    assert "is not in the submission" in grade.notes[0]


def test_zips_and_folders_in_any_shape(tmp_path):
    path = tmp_path / "rita.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("__MACOSX/block_allocator.py", "junk")
        archive.writestr("a/deep/place/block_allocator.py", REFERENCE)
        archive.writestr("a/lessons/03-block-allocator/stubs/block_allocator.py", STUB)
    assert Submission(path).find(LESSON, FILE) == REFERENCE.encode()
    (tmp_path / "sam.zip").write_bytes(b"no zip at all")
    assert "cannot be read" in Submission(tmp_path / "sam.zip").problem
    assert Submission(tmp_path / "sam.zip").find(LESSON, FILE) is None


@pytest.mark.parametrize("order", [1, -1])
def test_a_file_of_two_lessons_is_the_learners_and_not_the_emptied_one(tmp_path, order):
    entries = [
        ("lessons/04-block-table/block_table.py", "written"),
        ("lessons/04-block-table/stubs/block_table.py", "emptied"),
        ("lessons/08-fork-and-copy-on-write/stubs/block_table.py", "emptied"),
        ("minipaged/memory/block_table.py", "emptied"),
    ]
    for top in ("", "minipaged/"):  # one may call one's own folder so
        path = tmp_path / f"{top.strip('/') or 'plain'}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in entries[::order]:
                archive.writestr(top + name, text)
        for number in (4, 8):
            found = Submission(path).find(find_lesson(number), "minipaged/memory/block_table.py")
            assert found == b"written"


def test_what_is_only_in_the_package_is_found(tmp_path):
    (tmp_path / "minipaged" / "memory").mkdir(parents=True)
    (tmp_path / FILE).write_text(REFERENCE)
    assert Submission(tmp_path).find(LESSON, FILE) == REFERENCE.encode()


def test_of_a_zip_only_the_graded_files_are_unpacked(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(200):
            archive.writestr(f"{i}.py", b" " * 499_000)
        archive.writestr("block_allocator.py", REFERENCE)
    tracemalloc.start()
    try:
        assert Submission(path).find(LESSON, FILE) == REFERENCE.encode()
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 10 << 20, f"{most} bytes for a zip of {path.stat().st_size}"


def test_a_damaged_zip_is_a_problem_of_its_own(tmp_path):
    path = tmp_path / "tom.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("block_allocator.py", REFERENCE)
    data = bytearray(path.read_bytes())
    data[60:400] = b"\xff" * 340
    path.write_bytes(data)
    tom = Submission(path)
    assert tom.find(LESSON, FILE) is None
    assert "tom.zip cannot be read" in tom.problem


def test_a_name_that_is_not_utf8_stops_nobody(grader, tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/m\xfcller")
    os.mkdir(folder)
    path = submission(type(tmp_path)(folder), STUB + "\nraise ValueError('\\ud800')")
    (grade,) = grade_all(grader, [path])
    assert grade.name == "m?ller"
    write_csv(tmp_path / "points.csv", [grade])
    summary([grade], grader.names).encode()
    grade.tasks[0].feedback.encode()


def test_a_stray_file_does_not_make_one_submission_of_a_class(tmp_path, capsys):
    for name in ("anna", "bob"):
        submission(tmp_path / name, REFERENCE)
    for name in ("cleo.ZIP", "points.csv", "Thumbs.db", ".hidden"):
        (tmp_path / name).write_bytes(b"")
    found = found_submissions([tmp_path])
    assert [path.name for path in found] == ["anna", "bob", "cleo.ZIP"]
    assert "Thumbs.db, points.csv" in capsys.readouterr().out
    assert Submission(tmp_path / "cleo.ZIP").name == "cleo"
    assert found_submissions([tmp_path / "cleo.ZIP"]) == [tmp_path / "cleo.ZIP"]
    assert found_submissions([tmp_path / "anna"]) == [tmp_path / "anna"]
    (tmp_path / "lessons").mkdir()
    assert found_submissions([tmp_path]) == [tmp_path]


def test_a_class_side_by_side(grader, tmp_path):
    for i, text in enumerate([REFERENCE, STUB, "this is no Python", REFERENCE]):
        submission(tmp_path / f"student{i}", text)
    grades = list(grade_all(grader, sorted(tmp_path.iterdir()), jobs=2))
    assert [grade.total for grade in grades] == [100, 0, 0, 100]
    assert "your file cannot be imported" in grades[2].tasks[0].feedback
    assert "invalid syntax" in grades[2].tasks[0].feedback
    text = summary(grades, grader.names)
    assert "4 submissions, mean 50.0 of 100 points" in text
    assert "test_every_block_is_given_out_once" in text
    write_csv(tmp_path / "points.csv", grades)
    with open(tmp_path / "points.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["total"] for row in rows] == ["100.0", "0.0", "0.0", "100.0"]


def test_a_bundle_has_no_solution_and_works(tmp_path):
    write_bundle([LESSON], tmp_path / "bundle")
    own = tmp_path / "bundle" / "lessons" / LESSON.name / "block_allocator.py"
    assert own.read_text() == STUB
    assert (tmp_path / "bundle" / FILE).read_text() == STUB
    assert not (own.parent / "mutants.toml").exists()
    own.write_text(REFERENCE)
    done = subprocess.run(
        [sys.executable, "-m", "minipaged", "lesson", "test", "3"],
        cwd=tmp_path / "bundle",
        env={**os.environ, **LEAN, "PYTHONPATH": str(tmp_path / "bundle")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with pytest.raises(LessonError, match="is there already"):
        write_bundle([LESSON], tmp_path / "bundle")


def test_a_solution_in_a_bundle_is_noticed(tmp_path, monkeypatch):
    leak = tmp_path / "leak"
    shutil.copytree(LESSON.folder, leak / LESSON.name)
    lines = REFERENCE.splitlines(keepends=True)
    (leak / LESSON.name / "lesson.md").write_text("".join(lines[70:130]))
    monkeypatch.setenv("MINIPAGED_LESSONS", str(leak))
    with pytest.raises(LessonError, match=r"lesson\.md has the solution of BlockAllocator"):
        write_bundle([find_lesson(3)], tmp_path / "bundle")


def test_the_autograder_runs_as_gradescope_runs_it(tmp_path, hidden):
    folder = tmp_path / "source"
    write_autograder([LESSON], folder, hidden)
    assert os.access(folder / "run_autograder", os.X_OK)
    assert "torch" not in (folder / "setup.sh").read_text(), "lesson 3 needs no torch"
    results = tmp_path / "results" / "results.json"
    bugs, _ = mutants(LESSON)
    text = plant(REFERENCE, bugs["sharer_not_counted"])
    done = subprocess.run(
        [sys.executable, "-m", "minipaged.course.gradescope", "submission", str(results)],
        cwd=submission(tmp_path / "submission", text).parent,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(results.read_text())
    assert report["score"] == 40
    assert sum(test["max_score"] for test in report["tests"]) == 100


def test_an_autograder_installs_what_the_tests_of_its_lessons_import(tmp_path):
    write_autograder([find_lesson(17)], tmp_path / "source")
    setup = (tmp_path / "source" / "setup.sh").read_text()
    assert "'torch>=" in setup
    assert "'fastapi>=" in setup


def test_a_task_none_of_whose_tests_can_be_run_is_not_graded(tmp_path, monkeypatch):
    original = Grader._write_tests

    def without_fastapi(self, lesson):
        original(self, lesson)
        with open(self.bundle / "conftest.py", "a") as file:
            file.write("import sys\nsys.modules['fastapi'] = None\n")

    monkeypatch.setattr(Grader, "_write_tests", without_fastapi)
    with pytest.raises(LessonError, match=r"no test of task 17\.4 can be run here"):
        Grader([find_lesson(17)]).__enter__()


def test_hidden_tests_may_import_pytest_as_they_like(tmp_path):
    imports = {"from pytest import mark": "mark", "import pytest as pt": "pt.mark"}
    for number, (line, mark) in enumerate(imports.items()):
        text = f"{line}\n\n@{mark}.task('3.1')\ndef test_it():\n    pass\n"
        (tmp_path / f"test_{number}.py").write_text(text)
    with Grader([LESSON], tmp_path) as grader:
        assert len(grader.blank("x").tasks[0].hidden) == len(imports)
