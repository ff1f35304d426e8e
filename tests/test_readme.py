"""What the README shows is what the code does; what it links to exists."""

import json
import re
from pathlib import Path

import matplotlib as mpl
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 20
    for link in links:
        assert (ROOT / link).exists(), link


def test_its_figures_are_those_of_the_book():
    """All rounds are told, not the better ones; shares of memory are those that are stored."""
    measured = (ROOT / "book/measured.md").read_text("utf-8")
    rounds = re.search(r"round by round \| ([\d., ;]+) \|", measured)
    ratios = [float(ratio) for ratio in re.findall(r"\d\.\d\d", rounds[1])]
    assert f"| {min(ratios):.2f} to {max(ratios):.2f} |" in README
    stored = json.loads((ROOT / "book/results/fig2.json").read_text("utf-8"))["tasks"]
    systems = ("orca-max", "orca-pow2", "orca-oracle", "paged")
    shares = [stored[system]["result"]["shares"]["states"] for system in systems]
    told = ", ".join(f"{share:.1f}" for share in shares)
    assert f"{told} %" in README
    assert f"{told} %" in (ROOT / "book/results.md").read_text("utf-8")


def test_the_python_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert "ROMEO:" in capsys.readouterr().out


def test_the_commands_exist():
    from typer.testing import CliRunner

    from minipaged.cli import app

    pages = [README, *(page.read_text("utf-8") for page in (ROOT / "book").glob("*.md"))]
    commands = re.findall(r"^\$ minipaged (.*)$", "\n".join(pages), re.MULTILINE)
    assert len(commands) > 20
    helps = {}
    for line in commands:
        words = line.partition(" #")[0].split()
        command = tuple(words[:2] if words[0] in ("bench", "lesson", "course") else words[:1])
        if command not in helps:
            result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
            assert result.exit_code == 0
            helps[command] = result.output
        for option in re.findall(r"--[a-z-]+", line):
            assert option in helps[command], f"{line}: no {option}"


def test_the_picture_is_up_to_date(tmp_path):
    """Its labels are compared, not its lines: those differ between releases of matplotlib."""
    from minipaged.visual.figures import IMAGES, draw_block_map

    mpl.use("Agg")
    draw_block_map(tmp_path / "now.svg")

    def labels(path):
        return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text("utf-8"))

    assert len(labels(tmp_path / "now.svg")) > 32
    assert labels(tmp_path / "now.svg") == labels(IMAGES / "block-map.svg"), (
        "draw it again with: python -m minipaged.visual.figures"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "minipaged").rglob("*.py")), ids=str)
def test_rooms_import_only_from_rooms_below(path):
    """The order of the rooms is that of the architecture; visual/ draws records and nothing else.

    The engine's builder goes up once: whoever asks it for several ranks gets them.
    """
    rooms = ["request", "memory", "attention", "scheduling", "decoding", "models", "engine"]
    rooms += ["serving", "distributed", "visual", "evaluation"]
    upward = {("builder.py", "distributed")}
    room = path.relative_to(ROOT / "minipaged").parts[0]
    if room not in rooms:
        return
    imported = re.findall(r"^\s*(?:from|import) minipaged\.(\w+)", path.read_text("utf-8"), re.M)
    for other in imported:
        if other in rooms and (path.name, other) not in upward:
            assert rooms.index(other) <= rooms.index(room), f"{path.name} imports {other}"


def test_the_number_of_planted_bugs():
    bugs = list((ROOT / "tests" / "planted_bugs").glob("*.toml"))
    assert f"[{len(bugs)} small wrong versions]" in README
