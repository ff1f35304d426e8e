"""What a learner meets: substitution, commands, and how a failure is told."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from command import LEAN, minipaged
from typer.testing import CliRunner

from minipaged.cli import app
from minipaged.course.bundle import write_autograder, write_bundle
from minipaged.course.grading import Grader
from minipaged.course.lesson import LessonError, find_lesson, find_task, parse_numbers, read_lesson
from minipaged.course.narration import Narrated, Story, story
from minipaged.course.proof import (
    UnsoundLessonError,
    call_forked,
    check_bug_is_caught,
    run_on,
    solution,
)
from minipaged.course.stubs import mutants, open_task, stub_of
from minipaged.course.substitution import LessonFinder, overlay, substitute
from minipaged.course.testing import pytest_arguments

ROOT = Path(__file__).parents[1]
FILE = "minipaged/memory/block_allocator.py"
LESSON = find_lesson(3)


@pytest.fixture
def lessons(tmp_path, monkeypatch):
    """A copy of lesson 3 to work in."""
    folder = tmp_path / "lessons"
    own = shutil.ignore_patterns("block_allocator.py.*", "progress.json")
    shutil.copytree(LESSON.folder, folder / LESSON.name, ignore=own)
    (folder / LESSON.name / "block_allocator.py").unlink(missing_ok=True)
    monkeypatch.setenv("MINIPAGED_LESSONS", str(folder))
    for name, value in LEAN.items():
        monkeypatch.setenv(name, value)
    return folder / LESSON.name


def run(*words, **options):
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "100"}, **options)


def test_start_gives_the_stub_and_never_overwrites_work(lessons):
    own = lessons / "block_allocator.py"
    assert run("lesson", "start", "3").exit_code == 0
    assert own.read_text() == stub_of(LESSON, FILE)
    own.write_text("my work")
    result = run("lesson", "start", "3")
    assert "is there already" in result.output
    assert own.read_text() == "my work"


def test_reset_asks_and_keeps_a_backup(lessons):
    own = lessons / "block_allocator.py"
    assert isinstance(run("lesson", "reset", "3").exception, LessonError)
    own.write_text("my work")
    assert run("lesson", "reset", "3", input="n\n").exit_code == 1
    assert own.read_text() == "my work"
    for _ in range(2):
        assert run("lesson", "reset", "3", input="y\n").exit_code == 0
    assert own.read_text() == stub_of(LESSON, FILE)
    assert (lessons / "block_allocator.py.1.bak").read_text() == "my work"
    assert (lessons / "block_allocator.py.2.bak").exists()


def test_progress_is_what_the_tests_say(lessons):
    run("lesson", "start", "3")
    own = lessons / "block_allocator.py"
    reference = (ROOT / FILE).read_text()
    own.write_text(open_task(open_task(reference, LESSON.task("3.3")), LESSON.task("3.4")))
    assert "not tested" in run("lesson", "progress").output
    assert run("lesson", "test", "3").exit_code == 1
    assert "40 of 100 points" in run("lesson", "progress").output
    assert "40 of 100" in run("lesson", "list").output
    own.write_text(reference)
    assert run("lesson", "test", "3.3").exit_code == 0
    assert "60 of 100 points" in run("lesson", "progress").output
    (lessons.parent / "progress.json").write_text("{")
    with pytest.raises(LessonError, match=r"remove it and test your lessons again"):
        run("lesson", "progress", catch_exceptions=False)


def test_hints_come_one_after_the_other(lessons):
    hints = LESSON.task("3.2").hints
    for hint in (*hints, hints[2]):
        assert hint[:30] in run("lesson", "hint", "3.2").output
    assert hints[0][:30] in run("lesson", "hint", "3.2", "--level", "1").output


def test_diff_shows_the_solution_when_it_is_earned(lessons):
    run("lesson", "start", "3")
    assert run("lesson", "diff", "3", input="n\n").exit_code == 1
    shown = run("lesson", "diff", "3", "--yes").output
    assert '+        raise NotImplementedError("Task 3.1: BlockAllocator.allocate' in shown
    assert run("lesson", "diff", "3", "--stub").output == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("test", "99"), "there is no lesson 99; choose one of 3"),
        (("test", "3.9"), "lesson 3 has no task 3.9; it has 3.1, 3.2, 3.3, 3.4"),
        (("test", "three"), "names no lessons"),
        (("hint", "3"), "is no task"),
        (("test", "3"), "`minipaged lesson start 3` makes it"),
    ],
)
def test_what_is_not_there_is_said(lessons, words, message):
    with pytest.raises(LessonError, match=re.escape(message)):
        run("lesson", *words, catch_exceptions=False)


def test_names_of_lessons_and_tasks():
    assert parse_numbers("3,4, 8") == [3, 4, 8]
    assert find_task("3.2")[1].title == "Give it back"
    with pytest.raises(LessonError):
        find_task("3.2.1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = ", "does not describe a lesson"),
        ('title = "x"', "missing"),
        (
            'title = "x"\nsections = ""\nminutes = 1\n[[tasks]]\ntitle = "t"\npoints = 1\n'
            'file = "f.py"\nempty = ["f"]\nhints = ["one"]',
            "has 1 hints; give it 3",
        ),
    ],
)
def test_a_lesson_that_is_not_described(tmp_path, text, message):
    folder = tmp_path / "05-something"
    folder.mkdir()
    (folder / "lesson.toml").write_text(text)
    with pytest.raises(LessonError, match=message):
        read_lesson(folder)


def test_a_stub_is_the_reference_without_the_named_bodies():
    stub, reference = (ast.parse(t) for t in (stub_of(LESSON, FILE), (ROOT / FILE).read_text()))
    emptied = {name for task in LESSON.tasks for name in task.empty}

    def functions(tree):
        (pool,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
        return {f"{pool.name}.{n.name}": n for n in pool.body if isinstance(n, ast.FunctionDef)}

    ours, theirs = functions(stub), functions(reference)
    assert ours.keys() == theirs.keys()
    for name, node in ours.items():
        if name in emptied:
            assert ast.get_docstring(node) == ast.get_docstring(theirs[name])
            assert "NotImplementedError('Task 3." in ast.unparse(node.body[-1])
        else:
            assert ast.dump(node) == ast.dump(theirs[name])


def test_a_kernel_is_emptied_between_its_braces():
    lesson = find_lesson(12)
    for task in lesson.tasks:
        if not task.is_python and task.empty:
            text = open_task((ROOT / task.file).read_text(), task)
            assert text.count("{") == text.count("}")
            assert text.count(f'not_implemented("Task {task.number}: ') == len(task.empty)


@pytest.mark.parametrize(
    ("caught_by", "complaint"),
    [
        ("test_block_allocator.py::test_every_block_is_given_out_once", "is not caught by"),
        ("test_block_allocator.py::test_that_nobody_wrote", "is not caught by"),
        (None, 'does not say which test catches it; write caught_by = "test_block_allocator.py::'),
    ],
)
def test_a_bug_must_be_caught_by_the_test_that_it_names(caught_by, complaint):
    bugs, _ = mutants(LESSON)
    bug = {**bugs["free_at_the_first_goodbye"], "caught_by": caught_by}
    with pytest.raises(UnsoundLessonError, match=re.escape(complaint)):
        check_bug_is_caught(LESSON, bug)


def test_a_failure_tells_the_task_the_state_and_the_way_there(tmp_path):
    bugs, _ = mutants(LESSON)
    with solution(LESSON, bugs["free_at_the_first_goodbye"]) as own:
        arguments = pytest_arguments(LESSON, "3.3", own)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "HYPOTHESIS_PROFILE": "lesson"},
        )
    said = done.stdout
    assert done.returncode == 1
    assert "Task 3.3: Count the holders" in said
    story_told = re.search(r"pool = BlockAllocator\(1\).*?\n\n?[^ ]", said, re.DOTALL)[0]
    # the shortest way there: one block, held twice, let go once
    assert [line.split("#")[0].split("->")[0].strip() for line in story_told.splitlines()][:4] == [
        "pool = BlockAllocator(1)",
        "pool.allocate()",
        "pool.share(0)",
        "pool.free(0)",
    ]
    assert "free: {0}   counts: {0: 1}" in story_told
    assert "minipaged lesson hint 3.3" in said


def test_a_loop_is_ended_and_named():
    looping = {
        "file": FILE,
        "title": "loops",
        "old": "        self.check_available(1)\n",
        "new": "        while True: pass\n",
    }
    with solution(LESSON, looping) as own:
        outcome = run_on(LESSON, own, "3.1", "--task-seconds=1")
    errors = list(outcome.outcomes["3.1"].values())
    assert "no end after 1 s" in errors[0]
    assert "came to no end" in errors[1]


def test_a_process_that_dies_loses_only_what_was_not_run():
    dying = {
        "file": FILE,
        "title": "dies",
        "old": '        self._check_used(block, "freed")\n',
        "new": "        __import__('os')._exit(3)\n",
    }
    with solution(LESSON, dying) as own:
        outcome = run_on(LESSON, own)
    assert not outcome.ended
    assert outcome.running.startswith("task 3.2: test_a_block_that_is_given_back_is_free")
    assert outcome.score(LESSON) == {"3.1": 20, "3.2": 0, "3.3": 0, "3.4": 0}


def test_a_file_that_is_no_python_is_named(tmp_path):
    for text in ("def broken(:", "raise RuntimeError('at import')"):
        (tmp_path / "block_allocator.py").write_text(text)
        outcome = run_on(LESSON, tmp_path)
        assert outcome.broken
        assert set(outcome.score(LESSON).values()) <= {0}


def test_a_file_that_ends_the_process_when_it_is_imported_is_named(lessons):
    (lessons / "block_allocator.py").write_text("import os\nos._exit(0)\n")
    done = run("lesson", "test", "3")
    assert done.exit_code == 1
    said = " ".join(done.output.split())
    assert "ended (exit code 0) and tested nothing" in said
    assert "look at what block_allocator.py does when it is imported" in said


def test_the_finder_answers_for_its_modules_alone(tmp_path):
    finder = LessonFinder({FILE: tmp_path / "block_allocator.py", "cuda/x.cuh": tmp_path / "x"})
    spec = finder.find_spec("minipaged.memory.block_allocator")
    assert Path(spec.origin) == (tmp_path / "block_allocator.py").resolve()
    assert finder.find_spec("minipaged.memory.block_table") is None


KERNEL = "cuda/paged_attention_v1.cuh"


def sources_of(own, folder, told):
    """In a process of its own: where kernels lie that stand in for each other."""
    tempfile.tempdir = folder
    with open(told, "w") as file:
        for content in ("a", "b", "a"):
            Path(own).write_text(content)
            substitute({KERNEL: Path(own)})
            from minipaged.attention import build

            print(build.SOURCES, file=file)


def test_kernels_of_one_content_share_a_folder(tmp_path):
    """Only what is new leaves something behind, however often it is run."""
    own, folder, told = tmp_path / "own.cuh", tmp_path / "tmp", tmp_path / "told"
    folder.mkdir()
    for new in (2, 0):
        before = len(list(folder.iterdir()))
        assert call_forked(sources_of, (str(own), str(folder), str(told)), seconds=100) == 0
        sources = [Path(line) for line in told.read_text().split()]
        assert [(s.parent / KERNEL).read_text() for s in sources] == ["a", "b", "a"]
        assert len(list(folder.iterdir())) == before + new


def test_the_folder_of_kernels_is_complete(tmp_path, monkeypatch):
    """The package's files with the learner's among them, also after somebody cleaned up."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own = tmp_path / "own.cuh"
    own.write_text("mine")
    expected = {p.relative_to(ROOT): p.read_text() for p in (ROOT / "cuda").rglob("*.*")}
    expected[Path(KERNEL)] = "mine"
    for _ in range(2):
        folder = overlay({KERNEL: own})
        there = {p.relative_to(folder): p.read_text() for p in folder.rglob("*") if p.is_file()}
        assert there == expected
        (folder / KERNEL).unlink()
        (folder / "cuda/binding.cpp").write_text("not the package's")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_kernels_that_somebody_else_made_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own = tmp_path / "own.cuh"
    own.write_text("mine")
    os.chown(overlay({KERNEL: own}), 12345, -1)
    with pytest.raises(LessonError, match=r"belongs to another user; remove it, or set TMPDIR"):
        overlay({KERNEL: own})


def test_the_engine_runs_on_the_learners_module(lessons):
    text = (ROOT / FILE).read_text()
    marked = text.replace(
        "block = self._free.popitem()", 'print("MINE"); block = self._free.popitem()'
    )
    (lessons / "block_allocator.py").write_text(marked)
    words = ["generate", "--lessons", "3", "ROMEO:", "--max-tokens", "3", "--num-blocks", "4"]
    done = minipaged(*words, environment={"MINIPAGED_LESSONS": str(lessons.parent)})
    assert done.returncode == 0, done.stderr
    assert "MINE" in done.stdout
    assert "block_allocator.py is yours" in done.stderr


def test_use_says_what_runs_where(lessons):
    code = (
        "from minipaged.course import use; use(3)\n"
        "from minipaged.memory.block_allocator import BlockAllocator; import sys\n"
        "print(sys.modules[BlockAllocator.__module__].__file__)"
    )
    for has_begun in (False, True):
        if has_begun:
            shutil.copy(ROOT / FILE, lessons / "block_allocator.py")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        first, *_, last = done.stdout.strip().splitlines()
        if has_begun:
            assert first == f"{FILE} is yours: {LESSON.name}/block_allocator.py"
            assert Path(last) == (lessons / "block_allocator.py").resolve()
        else:
            assert "Lesson 3 runs on the reference" in first
            assert Path(last) == ROOT / FILE


def test_a_story_has_calls_results_and_states():
    class Counter:
        total = 0

        def add(self, n):
            self.total += n
            return self.total

        def fail(self):
            raise ValueError("no")

    story.begin("an example")
    counter = Narrated(Counter(), "counter", lambda c: f"total {c.total}", "Counter()")
    counter.add(2)
    assert counter.total == 2
    with pytest.raises(ValueError, match="no"):
        counter.fail()
    lines = story.text().splitlines()
    assert lines[0] == "# an example"
    assert re.fullmatch(r"counter = Counter\(\) +# total 0", lines[1])
    assert re.fullmatch(r"counter.add\(2\)  -> 2 +# total 2", lines[2])
    assert re.fullmatch(r"counter.fail\(\)  -> ValueError +# total 2", lines[3])
    story.start_call("counter.loop()")
    assert story.text().endswith("did not come back")
    assert Story().text() == ""


def test_notebooks_have_no_outputs_and_stable_ids():
    for path in sorted((ROOT / "lessons").glob("*/lesson.ipynb")):
        notebook = json.loads(path.read_text())
        ids = [cell["id"] for cell in notebook["cells"]]
        assert ids == [f"cell-{i}" for i in range(len(ids))], path
        for cell in notebook["cells"]:
            assert not cell.get("outputs"), path


@pytest.mark.parametrize(
    ("text", "share", "message"),
    [
        (None, 0.5, r"has no test_\*.py"),
        ("def test_it(): assert False", 0.5, "would count for nothing"),
        ('@pytest.mark.task("3.9")\ndef test_it(): assert False', 0.5, "would count for nothing"),
        ('@pytest.mark.task("3.1")\ndef test_it(): assert False', 2.0, "hidden_share is 2.0"),
    ],
)
def test_hidden_tests_that_would_count_for_nothing(tmp_path, text, share, message):
    if text is not None:
        (tmp_path / "test_hidden.py").write_text(text)
    folder = tmp_path / "autograder"
    with pytest.raises(LessonError, match=message):
        write_autograder([find_lesson(3)], folder, tmp_path, share)
    assert not folder.exists(), "what is wrong is said before anything is written"
    with pytest.raises(LessonError, match=message):
        Grader([find_lesson(3)], tmp_path, share)


def test_what_cannot_be_tested_here_is_said(tmp_path, monkeypatch, capfd):
    """Two tasks of lesson 17 need a server's packages; without them they are not merely open."""
    shutil.copytree(find_lesson(17).folder, tmp_path / "lessons" / find_lesson(17).name)
    monkeypatch.setenv("MINIPAGED_LESSONS", str(tmp_path / "lessons"))
    (tmp_path / "fastapi.py").write_text("raise ModuleNotFoundError('no fastapi')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run("lesson", "start", "17")
    assert run("lesson", "test", "17.4").exit_code == 1
    assert "tasks 17.4 and 17.5 need pip install" in capfd.readouterr().out


def test_commands_in_an_assignment_touch_one_lesson_and_one_copy_of_a_file(tmp_path, monkeypatch):
    """Lessons 6 and 7 both ask for scheduler.py; it lies in the folder of lesson 6, for both."""
    folder = tmp_path / "bundle"
    chosen = [find_lesson(6), find_lesson(7)]
    write_bundle(chosen, folder)
    monkeypatch.setenv("MINIPAGED_LESSONS", str(folder / "lessons"))
    monkeypatch.setattr("minipaged.course.substitution.assigned", lambda: [6, 7])
    home = folder / "lessons" / chosen[0].name
    shared, policy = home / "scheduler.py", home / "policy.py"
    for path in (shared, policy):
        path.write_text("my work")
    assert "is yours to complete" not in run("lesson", "start", "7").output
    assert not (folder / "lessons" / chosen[1].name / "scheduler.py").exists()
    assert run("lesson", "reset", "7", "--yes").exit_code == 0
    assert policy.read_text() == "my work", "it is lesson 6's alone"
    assert "Task 7.5" in shared.read_text()
