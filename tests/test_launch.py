"""Ranks as processes, started by LLM and by torchrun: they begin, end and fail together."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import command
import pytest
import torch
from command import FORKS_RANKS, Forked, minipaged
from safetensors.torch import load_file, save_file
from servers import RunningServer, exchange

from minipaged.distributed import communication, launch, processes
from minipaged.distributed.place import place_of
from minipaged.engine.builder import EngineOptions, is_parallel, load_engine
from minipaged.engine.llm import LLM
from minipaged.errors import ConfigurationError, MinipagedError, RankDiedError
from minipaged.models.loader import TINY
from minipaged.models.shard import Shard
from minipaged.request.sampling_params import SamplingParams
from minipaged.serving.async_engine import RANKS_CHECKED_EVERY

ENVIRONMENT = {**os.environ, **command.ENVIRONMENT, "OMP_NUM_THREADS": "1"}
OPTIONS = {"dtype": "float64", "num_blocks": 14, "block_size": 4, "preemption": "swap"}
PROMPTS = ["ROMEO:", "First Citizen:", "O, what light"]
GONE = 20.0  # seconds within which all processes of a job that failed must have ended


@pytest.fixture
def forked_ranks(monkeypatch):
    """Ranks that need not import torch; those of two models are started as a user's are."""
    monkeypatch.setattr(processes, "subprocess", FORKS_RANKS)


def is_alive(pid):
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        if os.path.exists("/proc"):
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_gone(pids, seconds=GONE):
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, "a rank outlives the job"
        time.sleep(0.05)


def others(llm):
    """Ranks and process ids of the others."""
    return {peer.rank: peer.pid for peer in llm.engine.runner.ranks.lifeline.arguments}


def texts(llm, **params):
    params = SamplingParams(**{"max_tokens": 9, "seed": 3, "ignore_eos": True, **params})
    return [[o.text for o in out.outputs] for out in llm.generate(PROMPTS, params)]


@pytest.mark.usefixtures("forked_ranks")
def test_processes_equal_one_until_one_of_them_dies():
    """Four ranks in a crowded pool, with n > 1 and a beam search; then SIGKILL in a step."""
    runs = {"n": 2, "temperature": 0.9}, {"use_beam_search": True, "best_of": 3, "temperature": 0}
    alone = LLM(**OPTIONS)
    expected = [texts(alone, **params) for params in runs]
    llm = LLM(tensor_parallel_size=4, **OPTIONS)
    pids = others(llm)
    assert [texts(llm, **params) for params in runs] == expected
    assert llm.engine.scheduler.preemption.num_swaps > 0
    assert llm.engine.runner.cache.num_bytes * 4 == alone.engine.runner.cache.num_bytes
    threading.Timer(0.3, os.kill, (pids[2], signal.SIGKILL)).start()
    with pytest.raises(RankDiedError) as caught:  # noqa: PT012
        while True:
            texts(llm)
    assert f"rank 2 (process {pids[2]} on {socket.gethostname()}) died" in str(caught.value)
    wait_until_gone(pids.values())
    assert not llm.engine.has_unfinished_requests
    with pytest.raises(RankDiedError, match="rank 2"):
        texts(llm)


def test_two_models_and_the_end_of_one_that_nobody_needs():
    threads = torch.get_num_threads()
    first = LLM(tensor_parallel_size=2, **OPTIONS)
    second = LLM(tensor_parallel_size=2, **{**OPTIONS, "num_blocks": None, "kv_cache_gib": 0.01})
    # Of each rank: keys and values of 5 layers, 4 tokens, 2 of 4 heads of 32 elements of 8 bytes.
    blocks = second.engine.scheduler.manager.device.num_blocks
    assert blocks == int(0.01 * 2**30 // (2 * 5 * 4 * 2 * 32 * 8))
    assert texts(first) == texts(second)
    pid = others(first)[1]
    del first
    gc.collect()
    wait_until_gone([pid])
    second.close()
    with pytest.raises(ConfigurationError, match=r"ended with close\(\); make another LLM"):
        texts(second)
    second.close()
    assert torch.get_num_threads() <= threads


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size is 0; it must be at least 1"),
        (
            {"tensor_parallel_size": 3},
            "8 query heads and 4 key-value heads cannot be divided among 3 ranks; start as many "
            "ranks as one of these: 1, 2, 4, 8",
        ),
        ({"tensor_parallel_size": 2, "model": "no/such"}, "fetching it from the hub failed"),
    ],
)
def test_what_cannot_be_is_said_once(options, message, capfd, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MinipagedError, match=message):
        LLM(**options)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.usefixtures("forked_ranks")
def test_what_is_wrong_with_the_part_of_another_rank(tmp_path, capfd):
    """An element that is not finite, in the rows of rank 1 alone."""
    (tmp_path / "config.json").write_text((TINY / "config.json").read_text())
    tensors = load_file(TINY / "model.safetensors")
    name = next(name for name in tensors if "layers.3.mlp.up_proj" in name)
    tensors[name][-1, 0] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(RankDiedError, match=rf"rank 1 \(process \d+ on .*\) failed: .*{name}"):
        LLM(tmp_path, tensor_parallel_size=2, num_blocks=9)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("phase", ["joining", "loading", "idle"])
def test_a_rank_that_dies_is_named(phase, monkeypatch):
    """SIGKILL before a step: rank 0 says who it was."""
    started = []
    start, load = launch.start_ranks, launch._load

    def start_and_kill(*arguments):
        ranks, store = start(*arguments)
        started.extend(process.pid for process in ranks._processes.values())
        if phase == "joining":
            os.kill(started[0], signal.SIGKILL)
        return ranks, store

    def kill_and_load(*arguments):
        if phase == "loading":
            os.kill(started[0], signal.SIGKILL)
        return load(*arguments)

    monkeypatch.setattr(launch, "start_ranks", start_and_kill)
    monkeypatch.setattr(launch, "_load", kill_and_load)
    with pytest.raises(RankDiedError) as caught:  # noqa: PT012
        llm = LLM(tensor_parallel_size=2, **OPTIONS)
        os.kill(started[0], signal.SIGKILL)
        texts(llm)
    assert f"rank 1 (process {started[0]} on {socket.gethostname()})" in str(caught.value)
    wait_until_gone(started)


@pytest.mark.usefixtures("forked_ranks")
def test_a_server_with_nothing_to_do_ends_when_a_rank_dies(caplog):
    engine = load_engine(TINY, EngineOptions(tensor_parallel_size=2, **OPTIONS))
    (peer,) = engine.runner.ranks.lifeline.arguments
    server = RunningServer(engine)
    health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    time.sleep(2 * RANKS_CHECKED_EVERY)
    assert exchange(server.port, health)[0] == 200
    os.kill(peer.pid, signal.SIGKILL)
    server._thread.join(GONE)
    assert not server._thread.is_alive(), "it goes on without a rank"
    assert server.server.has_failed
    assert f"the engine failed: {peer} died" in caplog.text


@pytest.mark.usefixtures("forked_ranks")
def test_rank_0_does_not_wait_for_ever_for_what_nobody_sends(monkeypatch):
    """As when one rank leaves out a sum of which the other is a part."""
    monkeypatch.setattr(communication, "IN_A_STEP", timedelta(seconds=1))
    llm = LLM(tensor_parallel_size=2, **OPTIONS)
    pids = others(llm)
    with pytest.raises(RankDiedError, match="waited for in vain in the middle of a step"):
        llm.engine.runner.ranks.communicator.all_reduce(torch.ones(3))
    wait_until_gone(pids.values())


def rank_0(generates):
    """Says who rank 1 is, and then works for ever, or rests."""
    llm = LLM(tensor_parallel_size=2, dtype="float64", num_blocks=210)
    print(*others(llm).values(), flush=True)
    while generates:
        llm.generate(["a"] * 8, SamplingParams(max_tokens=400, ignore_eos=True))
    time.sleep(1000)


ENDS = {
    "Ctrl-C in a step": (True, signal.SIGINT),
    "ended in a step": (True, signal.SIGTERM),
    "killed while idle": (False, signal.SIGKILL),
}


def test_the_others_end_with_rank_0():
    processes = {
        name: Forked(rank_0, generates, environment=ENVIRONMENT)
        for name, (generates, _) in ENDS.items()
    }
    for name, process in processes.items():
        pids = [int(word) for word in process.stdout.readline().split()]
        number = ENDS[name][1]
        time.sleep(0.3)
        process.send_signal(number)
        _, said = process.communicate(timeout=100)
        assert pids, said
        wait_until_gone(pids)
        if number == signal.SIGINT:
            assert "KeyboardInterrupt" in said
            assert "RankDiedError" not in said


SETS_BACK = """
import os, signal
from minipaged.distributed.parallel_runner import uninterrupted
signal.signal(signal.SIGINT, getattr(signal, {before!r}))
with uninterrupted():
    os.kill(os.getpid(), signal.SIGINT)
    print("the step is done", flush=True)
print("and more")
"""


@pytest.mark.parametrize(
    ("before", "code", "goes_on"),
    [
        ("SIG_DFL", -signal.SIGINT, False),
        ("SIG_IGN", 0, True),
        ("default_int_handler", -signal.SIGINT, False),
    ],
)
def test_ctrl_c_in_a_step_does_what_it_would_have_done(before, code, goes_on):
    """Later, when the step is done, and also where a program has no function for it."""
    done = subprocess.run(
        [sys.executable, "-c", SETS_BACK.format(before=before)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=100,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines() == ["the step is done", "and more"][: 1 + goes_on]
    assert ("KeyboardInterrupt" in done.stderr) == (before == "default_int_handler")


# torchrun.


def torchrun(size, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, "--nproc-per-node", str(size), "-m", "minipaged", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=250,
    )


GENERATE = ("generate", *PROMPTS[:2], "--dtype", "float64", "--num-blocks", 9, "--seed", 4)


def test_torchrun_writes_the_same_text_once():
    alone = minipaged(*GENERATE, "--max-tokens", 30)
    done = torchrun(2, *GENERATE, "--max-tokens", 30)
    assert done.returncode == 0, done.stderr
    lines = [[li for li in r.stdout.splitlines() if "tokens/s" not in li] for r in (alone, done)]
    assert lines[0] == lines[1]
    assert "4 query heads and 2 KV heads here and on rank 1 (process" in done.stderr


def ranks_by_hand(*commands):
    """What torchrun would do on several hosts, where each has a command line of its own."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": len(commands), "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    def run(rank):
        environment = {name: str(value) for name, value in {**place, "RANK": rank}.items()}
        return minipaged(*commands[rank], environment=environment)

    with ThreadPoolExecutor() as threads:
        ranks = list(threads.map(run, range(len(commands))))
    return [rank.returncode for rank in ranks], [(rank.stdout, rank.stderr) for rank in ranks]


def test_several_hosts():
    codes, said = ranks_by_hand(*[(*GENERATE, "--max-tokens", 4)] * 2)
    assert codes == [0, 0], said
    assert "[0] ROMEO: |" in said[0][0]
    assert said[1] == ("", "")


def test_ranks_with_different_arguments_end_with_one_sentence():
    codes, said = ranks_by_hand((*GENERATE, "--block-size", 8), (*GENERATE, "--block-size", 16))
    assert codes == [2, 2], said
    assert said[1] == ("", "")
    (sentence,) = [line for line in said[0][1].splitlines() if line.startswith("minipaged:")]
    assert "block_size is 16 on rank 1 (process " in sentence
    assert sentence.endswith("and 8 on rank 0; start all ranks with the same")


def test_a_rank_that_cannot_even_begin_is_heard_through_rank_0():
    codes, said = ranks_by_hand(GENERATE, (*GENERATE, "--dtype", "float64", "--max-tokens", 0))
    assert codes == [2, 2], said
    assert said[1] == ("", "")
    assert "failed: max_tokens is 0" in said[0][1]


def test_where_a_process_is():
    assert place_of({}) is None
    assert place_of({"RANK": "1", "WORLD_SIZE": "2"}) is None
    variables = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1"}
    assert place_of(variables) == (Shard(3, 4), 3, 4)
    place = place_of({**variables, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    assert place == (Shard(3, 4), 1, 2)
    assert json.dumps(place.local_rank) == "1"


def test_the_variables_of_another_launcher_are_not_for_us(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    assert not is_parallel(EngineOptions())
    assert is_parallel(EngineOptions(tensor_parallel_size=2))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert is_parallel(EngineOptions())
