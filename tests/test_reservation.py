"""Contiguous reservations behind the block manager's verbs: the same tokens, much more memory."""

import dataclasses

import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from strategies import CONTEXT, Request, Workload, reserving_workloads, tiny_decoder

from minipaged.engine.builder import EngineOptions, build_engine
from minipaged.errors import ConfigurationError, InvalidRequestError
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.reservation import RESERVATIONS, ReservationManager
from minipaged.request.sampling_params import SamplingParams


@given(workload=reserving_workloads())
def test_tokens_do_not_depend_on_the_memory_policy(workload):
    """T4 and T5: whatever is reserved, tokens are those of each request alone."""
    engine = workload.check()
    event(workload.memory_policy)
    assert engine.scheduler.num_preemptions == 0, "who runs has all that it needs"
    assert engine.scheduler.manager.runs.num_used == 0


@pytest.mark.parametrize(
    ("policy", "reserved"),
    [("orca-max", 512), ("static", 512), ("orca-pow2", 256), ("orca-oracle", 128)],
)
def test_what_is_reserved(policy, reserved):
    # 100 tokens of prompt and 300 of output in a context of 2,048, blocks of 4: the oracle wants
    # 400 slots, 100 blocks, and gets a run of 128; Pow2 100 + 512 slots, 153 blocks, of 256.
    manager = ReservationManager(4, 512, policy, 2048)
    manager.expect(1, 100, 399, 1)
    manager.append(1, 100)
    assert manager.runs.num_used == reserved
    assert manager.device.num_used == 25
    manager.append(1, 299)
    assert manager.tables[1].blocks == list(range(100)), "one behind the other"
    manager.check_integrity()
    manager.free(1)
    assert manager.runs.num_used == manager.device.num_used == 0


@given(children=st.integers(1, 4), length=st.integers(1, 9), drop_parent=st.booleans())
def test_a_fork_is_copied_whole_when_it_is_written(children, length, drop_parent):
    manager = ReservationManager(2, 64, "orca-oracle", CONTEXT)
    manager.expect(0, length, length + 3, children + 1)
    assert manager.has_room_to_begin(0, 1)
    manager.append(0, length)
    for child in range(1, children + 1):
        manager.fork(0, child)
    manager.check_integrity()
    alive = list(range(children + 1))
    if drop_parent:
        manager.free(alive.pop(0))
    for seq in alive:
        before = list(manager.tables[seq].blocks)
        copies = manager.append(seq, 1)
        # All but the last one move, with everything they have.
        assert [copy.source for copy in copies] == (before if seq != alive[-1] else [])
        assert [c.destination for c in copies] == manager.tables[seq].blocks[: len(copies)]
        manager.check_integrity()
    held = [block for seq in alive for block in manager.tables[seq].blocks]
    assert len(set(held)) == len(held), "nothing is shared"
    for seq in alive:
        manager.free(seq)
    assert manager.runs.num_used == 0


def test_a_request_waits_for_a_run_although_there_are_blocks_enough():
    """External fragmentation: three requests of 8 slots each meet a pool of 16 + 4 + 2 + 1."""
    requests = tuple(Request((1, 2, 3), {"max_tokens": 5, "ignore_eos": True}) for _ in range(3))
    admitted = {}
    for policy in ("orca-oracle", "paged"):
        engine = Workload(requests, 1, 23, 8, 30, memory_policy=policy).engine()
        for i, request in enumerate(requests):
            engine.add_request(str(i), request.prompt, SamplingParams(**request.params))
        engine.step()
        admitted[policy] = len(engine.scheduler.running)
    assert admitted == {"orca-oracle": 2, "paged": 3}


def test_static_batches_wait_for_the_longest():
    lengths = (2, 9, 3)
    requests = [Request((1, 2), {"max_tokens": n, "ignore_eos": True}) for n in lengths]
    admitted = {}
    for policy in ("orca-max", "static"):
        workload = Workload(tuple(requests), 1, 2 * CONTEXT, 8, 400, memory_policy=policy)
        engine = workload.engine()
        for i, request in enumerate(requests):
            engine.add_request(str(i), request.prompt, SamplingParams(**request.params))
        steps = 0
        while len(engine.scheduler.waiting):
            engine.step()
            steps += 1
        admitted[policy] = steps
    # Two fit.  The third comes when the first ends, or when both have.
    assert admitted == {"orca-max": 3, "static": 10}


class TestErrors:
    def test_a_request_that_never_fits_is_refused(self):
        engine = Workload((), 1, CONTEXT - 1, 8, 30, memory_policy="orca-max").engine()
        with pytest.raises(InvalidRequestError, match=r"may need 64 blocks of 1 .* pool has 63"):
            engine.add_request("r", [1, 2])

    @pytest.mark.parametrize(
        ("option", "value"), [("enable_prefix_caching", True), ("preemption", "swap")]
    )
    def test_contiguous_memory_is_neither_shared_nor_taken_back(self, option, value):
        options = EngineOptions(memory_policy="orca-max", num_blocks=64)
        options = dataclasses.replace(options, **{option: value})
        with pytest.raises(ConfigurationError, match=f"{option} is .*orca-max.*contiguous"):
            build_engine(tiny_decoder(), None, options)

    def test_an_unknown_policy(self):
        with pytest.raises(ConfigurationError, match="no memory policy 'big'; choose one of paged"):
            ReservationManager(1, 8, "big", 64)

    def test_the_policies_are_those_of_the_paper(self):
        assert sorted(RESERVATIONS) == ["orca-max", "orca-oracle", "orca-pow2", "static"]
        assert issubclass(ReservationManager, BlockManager)


@pytest.mark.parametrize("memory_policy", sorted(RESERVATIONS))
def test_the_default_pool_has_a_run_for_a_whole_context(memory_policy):
    """A context of 64 tokens takes 6 blocks of 12, and these a run of 8."""
    options = EngineOptions(block_size=12, max_num_seqs=1, memory_policy=memory_policy)
    engine = build_engine(tiny_decoder(), None, options)
    engine.add_request("a", [1] * 30, SamplingParams(max_tokens=34))
    assert engine.scheduler.manager.device.num_blocks == 8
