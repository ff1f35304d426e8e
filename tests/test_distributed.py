"""T9: k tensor-parallel ranks equal one, and a rank that dies is named.

Most ranks here are threads with real process groups between them; the last tests start processes.
"""

import dataclasses
import json

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from ranks_in_threads import FAMILIES, ThreadedRanks, load_family, write_family
from strategies import Request, Workload, crowding_requests, smallest_pool

from minipaged.distributed.plan_message import decode_plan, encode_plan
from minipaged.distributed.rendezvous import arguments_of, check_arguments, model_identity
from minipaged.distributed.traffic import Traffic, step_traffic
from minipaged.distributed.wire import Peer
from minipaged.engine.builder import EngineOptions, build_engine
from minipaged.errors import ConfigurationError, ModelLoadError
from minipaged.memory.block_table import BlockCopy
from minipaged.models.config import ModelConfig
from minipaged.models.decoder import Decoder
from minipaged.models.gguf_file import GGUFFile
from minipaged.models.loader import resolve
from minipaged.models.safetensors_files import SafetensorsFiles
from minipaged.models.shard import WHOLE, Shard, possible_sizes
from minipaged.scheduling.step_plan import ScheduledSequence, StepPlan

# A step on four ranks and two cores takes tens of milliseconds, so there are fewer examples.
few = settings(max_examples=max(3, settings().max_examples // 25))


# The parts of the ranks.


@st.composite
def configs(draw):
    kv_heads = draw(st.integers(1, 8))
    return ModelConfig(
        family="llama",
        vocab_size=draw(st.integers(8, 60)),
        hidden_size=8,
        num_layers=1,
        num_heads=kv_heads * draw(st.integers(1, 8)),
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 4)),
        intermediate_size=draw(st.integers(8, 60)),
        max_positions=16,
    )


@given(config=configs(), data=st.data())
def test_the_parts_of_all_ranks_are_the_whole(config, data):
    size = data.draw(st.sampled_from(possible_sizes(config)))
    shards = [Shard(rank, size) for rank in range(size)]
    for part, total in (
        (Shard.heads, config.num_heads),
        (Shard.mlp, config.intermediate_size),
        (Shard.vocabulary, config.vocab_size),
    ):
        kept = [part(shard, config).kept for shard in shards]
        assert [i for piece in kept for i in piece] == list(range(total)), part
        assert max(map(len, kept)) - min(map(len, kept)) <= 1
    holders = [
        sum(i in s.kv_heads(config).kept for s in shards) for i in range(config.num_kv_heads)
    ]
    copies = max(1, size // config.num_kv_heads)
    assert holders == [copies] * config.num_kv_heads
    # Every query head is on the rank of the KV head that it reads, at the same place in its group.
    group = config.num_heads // config.num_kv_heads
    for shard in shards:
        local = shard.local_config(config)
        heads, kv_heads = shard.heads(config).kept, shard.kv_heads(config).kept
        for i, head in enumerate(heads):
            assert kv_heads[i // (local.num_heads // local.num_kv_heads)] == head // group


@given(config=configs(), size=st.integers(2, 70))
def test_other_numbers_of_ranks_are_refused(config, size):
    fits = config.num_heads % size == 0 and (
        config.num_kv_heads % size == 0 or size % config.num_kv_heads == 0
    )
    fits = fits and size <= min(config.vocab_size, config.intermediate_size)
    if fits:
        assert Shard(0, size).local_config(config).num_heads * size == config.num_heads
        return
    possible = ", ".join(map(str, possible_sizes(config)))
    with pytest.raises(
        ConfigurationError, match=f"among {size} ranks; .* one of these: {possible}"
    ):
        Shard(0, size).local_config(config)


@given(config=configs(), size=st.integers(1, 8), gated=st.booleans())
def test_every_row_and_column_of_a_matrix_is_on_one_rank(config, size, gated):
    """KV heads apart, which several ranks may have."""
    config = dataclasses.replace(config, gated_mlp=gated, num_kv_heads=1, num_heads=8 * size)
    shards = [Shard(rank, size) for rank in range(size)]
    for name, shape in Decoder(config).state_dict().items():
        taken = torch.zeros(shape.shape)
        for shard in shards:
            offset, rows = 0, []
            for part in shard.rows(config, name) or [WHOLE.part_of(len(taken))]:
                rows += [offset + i for i in part.kept]
                offset += part.total
            assert offset == len(taken)
            if taken.dim() == 1:
                taken[rows] += shard.holds(name)
                continue
            columns = shard.columns(config, name) or WHOLE.part_of(taken.shape[1])
            assert columns.total == taken.shape[1]
            taken[torch.tensor(rows)[:, None], torch.tensor(list(columns.kept))] += 1
        whole = {"attention_norm", "mlp_norm", "final_norm", "q_norm", "k_norm"}
        expected = size if name.split(".")[-2] in whole else 1
        if "qkv_proj" in name:  # one KV head, which all ranks have
            taken = taken[: -2 * config.head_dim]
        assert (taken == expected).all(), name


# What is read of a checkpoint.


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A directory for each family."""
    folders = {name: tmp_path_factory.mktemp(name) for name in FAMILIES}
    for name, folder in folders.items():
        write_family(name, folder)
    return folders


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_rank_reads_only_its_part(name, size, checkpoints, monkeypatch):
    """All ranks together read the matrices once, but for shared KV heads."""
    sizes = []
    read = SafetensorsFiles.read

    def counted(self, tensor, part):
        values = read(self, tensor, part)
        sizes.append(values.numel() if values.dim() == 2 else 0)
        return values

    monkeypatch.setattr(SafetensorsFiles, "read", counted)
    load_family(name, checkpoints[name])
    whole = sum(sizes)
    sizes.clear()
    for rank in range(size):
        load_family(name, checkpoints[name], Shard(rank, size))
    config = FAMILIES[name][0]
    copies = max(0, size - config.num_kv_heads) * 2 * config.head_dim * config.hidden_size
    positions = (size - 1) * (config.max_positions + config.learned_position_offset)
    expected = whole + config.num_layers * copies
    assert sum(sizes) == expected + (positions * config.hidden_size if config.rope is None else 0)


def test_the_bytes_of_other_ranks_are_not_touched(tmp_path):
    """A tensor of 64 MB: a rank that asks for an eighth makes the system map no more than that."""
    from safetensors.torch import save_file

    save_file({"w": torch.ones(4096, 4096)}, tmp_path / "model.safetensors")
    files = SafetensorsFiles(tmp_path)
    files.read("w", (slice(0, 1), slice(0, 1)))
    before = mapped_bytes(tmp_path)
    if before is None:
        pytest.skip("this system does not say what is mapped")
    assert files.read("w", (slice(512, 1024), slice(0, 4096))).sum() == 512 * 4096
    eighth = 4096 * 4096 * 4 // 8
    assert eighth <= mapped_bytes(tmp_path) - before < 1.5 * eighth


def mapped_bytes(folder):
    """Bytes of the files of a folder that are in this process's memory."""
    try:
        lines = open("/proc/self/smaps").read().splitlines()  # noqa: SIM115
    except OSError:
        return None
    total, ours = 0, False
    for line in lines:
        first = line.split()[0]
        if not first.endswith(":"):
            ours = str(folder) in line
        elif ours and first == "Rss:":
            total += int(line.split()[1]) * 1024
    return total


def test_a_quantized_file_is_read_by_rows():
    """The rows of three ranks, put together, are the tensor, with the rotary pairs in order."""
    try:
        file = GGUFFile(resolve("smollm2"))
    except ModelLoadError:
        pytest.skip("SmolLM2 is not installed")
    for tensor, matrix in {
        "attn_q": Shard.heads,
        "attn_k": Shard.kv_heads,
        "ffn_up": Shard.mlp,
    }.items():
        name = f"blk.3.{tensor}.weight"
        whole = file.read(name, (slice(None), slice(None)))
        rows = []
        for rank in range(3):
            part = matrix(Shard(rank, 3), file.config)
            part = part.scaled(1 if tensor == "ffn_up" else file.config.head_dim)
            rows.append(file.read(name, (slice(part.kept.start, part.kept.stop), slice(8, 40))))
        assert torch.equal(torch.cat(rows), whole[:, 8:40])


# The control message.

numbers = st.integers(0, 2**40)
pairs = st.lists(st.builds(BlockCopy, numbers, numbers), max_size=3).map(tuple)
plans = st.builds(
    StepPlan,
    st.lists(
        st.builds(
            ScheduledSequence,
            numbers,
            st.lists(numbers, max_size=5).map(tuple),
            numbers,
            st.lists(st.integers(-1, 2**31), max_size=5).map(tuple),
            st.booleans(),
        ),
        max_size=4,
    ).map(tuple),
    pairs,
    pairs,
    pairs,
    st.lists(st.text(max_size=3), max_size=2).map(tuple),
)


@given(plan=plans)
def test_a_plan_survives_the_way(plan):
    message = encode_plan(plan)
    assert message.dtype == torch.int64
    decoded = decode_plan(message)
    assert decoded == plan._replace(preempted=(), swapped=())
    assert all(type(item.samples) is bool for item in decoded.scheduled)
    config = FAMILIES["llama"][0]
    assert step_traffic(config, plan, 2, 8).control == 8 + message.nbytes


# T9.


def crowd(preemption, window):
    """A sample, a pair of samples and a beam search, in a pool for little more than one of them."""
    sample = {"max_tokens": 8, "ignore_eos": True, "temperature": 1.0}
    requests = (
        Request((1, 2, 4, 7, 12), sample),
        Request((5, 9, 10), {**sample, "n": 2, "seed": 3}),
        Request((11,), {**sample, "temperature": 0.0, "use_beam_search": True, "best_of": 2}),
    )
    budget = 6
    blocks = max(smallest_pool(request, 2, window, budget) for request in requests)
    host = 0 if preemption == "recompute" else blocks
    return Workload(
        *(requests, 2, blocks, 6, budget),
        preemption=preemption,
        num_host_blocks=host,
        sliding_window=window,
    )


@st.composite
def parallel_workloads(draw, window):
    """A few requests in small pools; both engines must follow the same schedule."""
    chosen = []
    for request in draw(st.lists(crowding_requests, min_size=2, max_size=3)):
        params = {**request.params, "max_tokens": draw(st.integers(3, 7))}
        chosen.append(
            dataclasses.replace(request, prompt=request.prompt[:8], params=params, priority=0)
        )
    block_size, budget = draw(st.integers(1, 3)), 24 + draw(st.integers(0, 8))
    blocks = max(smallest_pool(request, block_size, window, budget) for request in chosen)
    blocks += draw(st.integers(0, 2))
    # By cost ("auto") a rank with fewer heads may decide otherwise.
    preemption = draw(st.sampled_from(["recompute", "swap"]))
    return Workload(
        *(tuple(chosen), block_size, blocks, 24, budget),
        preemption=preemption,
        num_host_blocks=draw(st.integers(1, blocks)) if preemption == "swap" else 0,
        sliding_window=window,
        prefix_caching=window is None and draw(st.booleans()),
    )


def serve(workload, engine):
    """Token ids by request, and the logits and the plan of every step."""
    logits, plans = [], []
    execute = engine.runner.execute

    def remember(plan):
        plans.append(plan)
        logits.append(execute(plan).clone())
        return logits[-1]

    engine.runner.execute = remember
    outputs, _ = workload.run(engine)
    del engine.runner.execute
    tokens = {i: [c.token_ids for c in output.outputs] for i, output in outputs.items()}
    return tokens, logits, plans


@pytest.fixture(scope="module")
def threaded():
    """Ranks that are connected once and used by many tests; anew where one has failed."""
    made = {}

    def get(size):
        if size not in made or made[size].errors or made[size].threads:
            made[size] = ThreadedRanks(size)
        return made[size]

    return get


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_ranks_equal_one(name, size, checkpoints, threaded):
    """The same tokens, logits and schedule; every byte that was counted is in the formula."""
    config = FAMILIES[name][0]
    alone = load_family(name, checkpoints[name])

    def compare(workload):
        engine = build_engine(alone, None, workload.options(alone))
        tokens, logits, plans = serve(workload, engine)
        ranks = threaded(size)
        decoders = ranks.load(name, checkpoints[name])
        engine = ranks.engine(decoders, workload.options(decoders[0]))
        tokens_of_ranks, logits_of_ranks, plans_of_ranks = serve(workload, engine)
        engine.runner.close()
        assert plans_of_ranks == plans
        for ours, theirs in zip(logits_of_ranks, logits, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
        assert tokens_of_ranks == tokens
        formula = sum((step_traffic(config, plan, size, 8) for plan in plans), start=Traffic())
        formula += Traffic(control=8)  # the header that says that there is no more
        assert [communicator.payload for communicator in ranks.communicators] == [formula] * size
        return engine.scheduler.preemption

    if size == 2:
        assert compare(crowd("swap", config.sliding_window)).num_swaps > 0
    else:
        assert compare(crowd("recompute", config.sliding_window)).num_recomputations > 0

    @few
    @given(workload=parallel_workloads(config.sliding_window))
    def check(workload):
        preemption = compare(workload)
        event(f"recomputations: {min(preemption.num_recomputations, 3)}")
        event(f"swaps: {min(preemption.num_swaps, 3)}")

    check()


def test_what_goes_over_the_wire():
    """Two ranks add up 10 bytes: each sends half of its own to be summed, and the sum of it."""
    assert Traffic(control=1).on_the_wire(4) == 3
    assert Traffic(all_reduce=10).on_the_wire(2) == 20
    assert Traffic(gather=5).on_the_wire(3) == 10
    assert Traffic(1, 2, 3).on_the_wire(1) == 0


# What the ranks were asked for.


def test_different_arguments_are_named_with_both_values(tmp_path):
    mine = arguments_of("tiny", EngineOptions(block_size=16, dtype=torch.float32))
    same = arguments_of("tiny", EngineOptions(dtype="float32"))
    peers = [Peer(1, 11, "a"), Peer(2, 12, "b")]
    check_arguments(mine, dict.fromkeys(peers, same))
    json.dumps(mine)
    other = arguments_of("tiny", EngineOptions(block_size=8, dtype="float32"))
    with pytest.raises(
        ConfigurationError,
        match=r"block_size is 8 on rank 2 \(process 12 on b\) and 16 on rank 0; start all",
    ):
        check_arguments(mine, {peers[0]: same, peers[1]: other})


def test_the_contents_of_a_model_are_compared_not_its_path(tmp_path):
    folders = []
    for name, last in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"0" * 3_000_000 + last)
        folders.append(folder)
    first, equal, different = map(model_identity, folders)
    assert first == equal != different
