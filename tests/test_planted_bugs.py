"""The tests are worth something: each of these small wrong versions is caught by its theorem's.

A bug is data (planted_bugs/*.toml): the file, the old text and the new, the theorem it breaks
and the tests that must fail.  Each is planted in a copy of its file, which takes the place of the
package's own while the tests run.

A bug in cuda/ is planted in a copy of the kernels, which are compiled with it and checked as in
test_kernels.py; its file also says which kernel that is, and in what words it must be reported.
"""

import re
import shutil
import sys
from pathlib import Path

import pytest
import quick_kernels
import test_kernels
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minipaged.course.proof import run_forked
from minipaged.course.stubs import plant
from minipaged.memory.block_table import BlockCopy

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
BUGS = {
    path.stem: tomllib.loads(path.read_text("utf-8"))
    for path in sorted((ROOT / "tests" / "planted_bugs").glob("*.toml"))
}


def run_tests(tests, files=None, profile="planted"):
    """Run tests of this project, with other files in the place of some of the package's."""
    options = ["-x", "--timeout=120", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    return run_forked([*options, *(str(ROOT / "tests" / test) for test in tests)], files, profile)


@pytest.mark.parametrize("name", [name for name in BUGS if "tests" in BUGS[name]])
def test_a_planted_bug_is_caught(name, tmp_path):
    bug = BUGS[name]
    wrong = tmp_path / "wrong.py"
    wrong.write_text(plant((ROOT / bug["file"]).read_text("utf-8"), bug), "utf-8")
    for test in bug["tests"]:
        code, said = run_tests([test], {bug["file"]: wrong})
        # Exit code 1: tests ran, and some failed.
        assert code == 1, f"{test} did not catch it:\n{said[-2000:]}"


def check_kernel(name):
    """What test_kernels.py checks of a kernel, but not for the smallest example that fails."""

    cases = test_kernels.exact_cases()
    if name == "tensor_cores":
        cases = test_kernels.typed_cases().filter(lambda case: case.head_dim == 64)

    @settings(settings.get_profile("planted"))
    @given(case=cases, splits=st.integers(1, 5))
    def check(case, splits):
        if name == "tensor_cores":
            test_kernels.check_tensor_cores(torch.bfloat16, "cpu", case)
        elif name == "prompt":
            test_kernels.check_exactly(case)
        else:
            case = test_kernels.only_decoding(case)
            test_kernels.check_exactly(case, decode=name, splits=splits)

    if name == "copies":
        test_kernels.check_copies([BlockCopy(0, 3), BlockCopy(1, 2)])
    elif name == "offsets":
        test_kernels.test_a_cache_of_more_than_2_to_the_31_elements()
    else:
        check()


@pytest.mark.parametrize("name", [name for name in BUGS if "kernel" in BUGS[name]])
def test_a_planted_bug_of_a_kernel_is_reported(name, tmp_path, monkeypatch):
    bug = BUGS[name]
    shutil.copytree(ROOT / "cuda", tmp_path / "cuda")
    wrong = tmp_path / bug["file"]
    wrong.write_text(plant(wrong.read_text("utf-8"), bug), "utf-8")
    instances = (torch.float64,), test_kernels.EXACT_SIZES
    if bug["kernel"] in ("tensor_cores", "offsets"):
        instances = (torch.bfloat16,), (64,)
    # Of a mixed batch v1 does the decoding part; the offsets are those of every kernel.
    versions = () if bug["kernel"] == "offsets" else ("v1", bug["kernel"])
    kernels = quick_kernels.compile_kernels(tmp_path / "cuda", *instances, versions)
    for compiled in ("exact_kernels", "typed_kernels"):
        monkeypatch.setattr(test_kernels, compiled, lambda *_: kernels)
    with pytest.raises((RuntimeError, AssertionError), match=bug["report"]):
        check_kernel(bug["kernel"])


def test_the_same_tests_pass_without_a_bug(tmp_path):
    """A file that takes another's place makes no test fail by that alone."""
    file = "minipaged/memory/block_table.py"
    same = tmp_path / "same.py"
    same.write_text((ROOT / file).read_text("utf-8"), "utf-8")
    memory = [bug for bug in BUGS.values() if bug["file"].startswith("minipaged/memory/")]
    tests = dict.fromkeys(test for bug in memory for test in bug["tests"])
    code, said = run_tests(tests, {file: same}, profile="brief")
    assert code == 0, said[-2000:]


def test_every_bug_says_what_it_breaks():
    assert len(BUGS) >= 20
    for name, bug in BUGS.items():
        assert re.fullmatch(r"T\d+", bug["theorem"]), name
        checked = {"kernel", "report"} if bug["file"].startswith("cuda/") else {"tests"}
        assert set(bug) == {"title", "theorem", "file", "edits"} | checked, name
        assert (ROOT / bug["file"]).exists(), name
        for edit in bug["edits"]:
            assert edit["old"] != edit["new"], name
    assert {bug["theorem"] for bug in BUGS.values()} >= {f"T{i}" for i in range(1, 9)}
