"""The command line as a user meets it: output, exit codes, one sentence for every mistake."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from command import ENVIRONMENT, Forked, minipaged, run_command


def test_generate_streams_and_draws_the_block_map(tmp_path):
    page = tmp_path / "trace.html"
    done = minipaged(
        *("generate", "ROMEO:", "JULIET:\nO", "KING", "--num-blocks", 10, "--max-tokens", 60),
        *("--trace-html", page, "--ignore-eos"),
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert "[0] ROMEO: |" in out
    assert "[1] JULIET: O |" in out
    assert "tokens/s   0 running   0 waiting" in out
    assert "preempted   " in out
    assert "Block map at step" in out
    assert "of 10 blocks used" in out
    assert out.count("/16 full") == 3
    assert "wasted over the whole run" in out
    assert "KV cache: 10 blocks of 16 tokens" in done.stderr
    assert page.read_text("utf-8").startswith("<!doctype html>")


def test_the_same_seed_gives_the_same_text():
    first, second, other = (
        minipaged("generate", "ROMEO:", "--max-tokens", 30, "--seed", seed).stdout.split(
            "tokens/s"
        )[0]
        for seed in (1, 1, 2)
    )
    lines = [[li for li in out.splitlines() if " | " in li] for out in (first, second, other)]
    assert lines[0] == lines[1] != lines[2]


def test_samples_and_beams_with_all_of_it():
    """Sharing, swapping and the prefix cache in one run, and what the summary says of them."""
    prompts = [f"ROMEO: what light is it that breaks? {name}:" for name in ("JULIET", "NURSE")]
    common = ("--num-blocks", 14, "--max-tokens", 60, "--preemption", "swap", "--prefix-cache")
    done = minipaged("generate", *prompts, *common, "-n", 3, "--ignore-eos")
    assert done.returncode == 0, done.stderr
    for label in ("[0.0]", "[0.2]", "[1.1]"):
        assert f"{label} ROMEO: what light" in done.stdout
    for words in ("blocks shared at most", "of the blocks saved by", "copied on", "swapping:"):
        assert words in done.stdout
    assert "prefix cache: " in done.stdout
    assert done.stdout.count("complete") == 6
    done = minipaged("generate", prompts[0], "--beam-search", "-n", 2, "--best-of", 3, *common)
    assert done.returncode == 0, done.stderr
    assert "[0.1] ROMEO: what light" in done.stdout
    assert "dropped" in done.stdout


def test_prompts_from_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("ROMEO:\n\nJULIET:\n")
    done = minipaged("generate", "KING:", "--prompts", file, "--max-tokens", 4, "--num-blocks", 8)
    assert done.returncode == 0, done.stderr
    for i, name in enumerate(["KING", "ROMEO", "JULIET"]):
        assert f"[{i}] {name}: |" in done.stdout
    assert done.stdout.count("last block ") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "there is no prompt"),
        (["generate", "x", "--max-tokens", 0], "max_tokens is 0"),
        (["generate", "x", "--max-tokens", -5], "max_tokens is -5"),
        (["generate", "x", "--top-p", 1.5], "top_p is 1.5"),
        (["generate", "x", "--top-p", 0], "top_p is 0"),
        (["generate", "x", "--num-blocks", 0], "num_blocks is 0"),
        (["generate", "x", "--block-size", 0], "--block-size is 0; it must be at least 1"),
        (["generate", "x", "--seed", -1], "--seed is -1; it must be at least 0"),
        (["generate", "x", "--max-num-seqs", 0], "max_num_seqs is 0"),
        (["generate", "x", "--attention", "cuda"], "needs an NVIDIA GPU"),
        (["generate", "x", "--trace-html", "."], "--trace-html . is a folder"),
        (["simulate", "--json", "no/x.json"], "--json no/x.json lies in a folder that does not"),
        (["simulate", "--seconds", "nan"], "--seconds is nan"),
        (["simulate", "--dataset", "translation"], "choose sharegpt, alpaca, translation-1"),
        (["tune-block-size", "--rate", 5, "--seconds", -1], "--seconds is -1"),
        (["tune-block-size", "--rate", 5, "--plot", "x.xyz"], "it must end in .svg or .png"),
        (["bench", "kernel", "--head-size", 0], "--head-size is 0"),
        (["bench", "throughput", "--threads", -1], "--threads is -1"),
        (["course", "grade", "README.md", "--lessons", "3"], "README.md is a file"),
        (["generate", "x", "--dtype", "int8"], "no dtype 'int8'"),
        (["generate", "x", "--attention", "magic"], "no attention 'magic'"),
        (["generate", "x", "--model", "no/such-model"], "fetching it from the hub failed"),
        (["generate", "x", "--model", "."], "has no config.json"),
        (["generate", "x", "--prompts", "no-such-file"], "--prompts no-such-file cannot be read"),
        (["generate", "x", "--trace-html", "no-such-dir/t.html"], "does not exist"),
        (["generate", "x", "--n", 0], "n is 0"),
        (["generate", "x", "--n", 3, "--best-of", 2], "best_of is 2, below n 3"),
        (["generate", "x", "--n", 2, "--temperature", 0], "use beam search"),
        (["generate", "x", "--preemption", "swap", "--swap-gib", 0], "swap_space_gib is 0"),
        (["generate", "x", "--preemption", "kill"], "preemption is 'kill'"),
        (["chat", "--model", "tiny"], "tiny has no chat template"),
        (["bench", "throughput", "--requests", "no-such-file"], "no-such-file cannot be read"),
        (["bench", "throughput", "--against", "vllm"], "--against vllm is unknown"),
        (["bench", "throughput", "--repeats", 0], "--repeats is 0"),
        (["bench", "scheduler", "--steps", 0], "--steps is 0"),
        (["bench", "kernel", "--heads", "8"], "--heads is '8'"),
        (["bench", "kernel", "--heads", "8/3"], "--heads is '8/3'"),
        (["bench", "kernel", "--batch", 0], "--batch is 0"),
        (["bench", "kernel", "--dtype", "auto"], "--dtype auto has no meaning"),
        (["bench", "resources", "--head-size", 20], "no kernel for heads of 20 elements"),
        (["simulate", "--rate", 0], "the rate is 0 requests per second"),
        (["simulate", "--deployment", "gpt-5"], "no deployment 'gpt-5'"),
        (["reproduce", "fig1"], "no figure 'fig1'"),
        (["bench", "memory", "--memory-policy", "big"], "no memory policy 'big'"),
        (["bench", "throughput", "--shortest", 9, "--longest", 3], "--shortest is 9"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_mistakes_are_one_sentence_and_exit_code_2(arguments, message):
    done = minipaged(*arguments)
    assert done.returncode == 2
    *messages, last = done.stderr.strip().splitlines()
    assert message in last
    assert all("KV cache" in line for line in messages)
    assert "Traceback" not in done.stderr


def test_a_bad_prompt_does_not_harm_the_others():
    long = "to be " * 400
    done = minipaged("generate", "ROMEO:", "", long, "--num-blocks", 20, "--max-tokens", 10)
    assert done.returncode == 2
    assert "[0] ROMEO: |" in done.stdout
    assert "request 0" in done.stdout
    assert "prompt 1 (): the prompt is empty" in done.stderr
    assert "prompt 2 (to be to be" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_shows_what_there_is():
    # Sixty long outputs, one after the other: much more than is done before the interrupt.
    options = ["--max-tokens", "480", "--ignore-eos", "--max-num-seqs", "1"]
    words = ["generate", *["ROMEO:"] * 60, *options]
    process = Forked(run_command, words, environment={**os.environ, **ENVIRONMENT})
    first = process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "[0] ROMEO: |" in first + out
    assert "Block map at step" in out
    assert "Traceback" not in errors


def make_chat_model(folder, **options):
    """The shipped model under a template of its own: how it answers does not matter."""
    from minipaged.models.loader import TINY

    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    config = json.loads((TINY / "config.json").read_text("utf-8")) | options
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )


def test_chat_reads_lines_until_the_end(tmp_path):
    make_chat_model(tmp_path)
    done = minipaged(
        *("chat", "--model", tmp_path, "--max-tokens", 8, "--num-blocks", 12), text="Hello\nYou\n"
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 4


def test_chat_with_a_sliding_window(tmp_path):
    """It frees the beginning of a sequence, so that nothing can be found there."""
    make_chat_model(tmp_path, model_type="mistral", sliding_window=64)
    arguments = ("chat", "--model", tmp_path, "--max-tokens", 4, "--num-blocks", 12)
    refused = minipaged(*arguments, text="Hello\n")
    assert refused.returncode == 2
    assert "--no-prefix-cache" in refused.stderr
    assert minipaged(*arguments, "--no-prefix-cache", text="Hello\n").returncode == 0


def test_nothing_to_trace(tmp_path):
    done = minipaged("generate", "", "--trace-html", tmp_path / "trace.html")
    assert done.returncode == 2
    assert "the prompt is empty" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_prompt_that_is_no_text_harms_no_other():
    done = minipaged("generate", "A\udcff", "ROMEO:", "--max-tokens", 3, "--num-blocks", 20)
    assert done.returncode == 2
    assert "not Unicode text" in done.stderr
    assert "[1] ROMEO:" in done.stdout


def test_a_terminal_does_not_obey_a_prompt():
    done = minipaged("generate", "\x1b[2JROMEO:", "", "--max-tokens", 3, "--num-blocks", 20)
    assert "[0] ␛[2JROMEO:" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


def test_where_the_steps_are_is_said_as_it_is(tmp_path):
    page = tmp_path / "run[old].html"
    done = minipaged(
        *("generate", "ROMEO:", "--max-tokens", 3, "--num-blocks", 20, "--trace-html", page)
    )
    assert done.stdout.splitlines()[-1].endswith(str(page))
    assert page.exists()


def test_a_terminal_that_knows_ascii_only():
    """What it cannot show is lost, and nothing else."""
    done = subprocess.run(
        [sys.executable, "-m", "minipaged", "generate", "ROMEO:", "--max-tokens", "3"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert b"physical" in done.stdout or b"block" in done.stdout


def test_throughput_of_a_workload_from_a_file(tmp_path):
    file, figures = tmp_path / "requests.jsonl", tmp_path / "figures.json"
    file.write_text('{"prompt_length": 5, "output_length": 6}\n' * 3)
    done = minipaged(
        *("bench", "throughput", "--requests", file, "--repeats", 1, "--json", figures),
        *("--num-blocks", 20),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(figures.read_text())
    (ours,) = result["measurements"]
    assert ours["tokens_per_second"] == pytest.approx(18 / min(ours["seconds"]))
    assert sum(ours["shares"].values()) == pytest.approx(1)
    assert result["command"].startswith("minipaged bench throughput")
    assert "model" in done.stdout
    file.write_text('{"prompt_length": 5, "output_length": 6}\n{"prompt_length": 0}\n')
    done = minipaged("bench", "throughput", "--requests", file)
    assert done.returncode == 2
    assert f"line 2 of {file} is not" in done.stderr


def test_cost_of_the_scheduler(tmp_path):
    figures = tmp_path / "figures.json"
    done = minipaged(
        *("bench", "scheduler", "--num-seqs", 3, "--num-seqs", 50, "--steps", 5),
        *("--json", figures),
    )
    assert done.returncode == 0, done.stderr
    costs = json.loads(figures.read_text())["measurements"]
    assert [cost["num_seqs"] for cost in costs] == [3, 50]
    assert all(0 < cost["median_ms"] <= cost["largest_ms"] for cost in costs)
