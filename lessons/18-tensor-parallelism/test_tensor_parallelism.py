"""Lesson 18: k ranks with a part of the model each compute what one computes (T9)."""

import dataclasses
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from strategies import Request, Workload, tiny_decoder

from minipaged.course.narration import story
from minipaged.distributed.communication import Communicator, gloo_group
from minipaged.distributed.parallel_runner import ParallelRunner, work
from minipaged.distributed.plan_message import decode_plan, encode_plan
from minipaged.distributed.traffic import Traffic, step_traffic
from minipaged.engine.builder import EngineOptions, build_engine, build_runner
from minipaged.memory.block_table import BlockCopy
from minipaged.models.config import ModelConfig
from minipaged.models.decoder import Decoder
from minipaged.models.shard import Part, Shard, possible_sizes
from minipaged.scheduling.step_plan import ScheduledSequence, StepPlan

pytestmark = pytest.mark.usefixtures("one_thread")


def examples(number=None):
    """So many examples; without the phase that explains one, for the story does that."""
    usual = settings()
    phases = [phase for phase in usual.phases if phase is not Phase.explain]
    return settings(max_examples=number or usual.max_examples, phases=phases)


# 18.1: who has which heads


def numbers_of(part):
    return list(part.kept)


@pytest.mark.task("18.1")
@examples()
@given(total=st.integers(1, 60), size=st.integers(1, 8))
def test_even_parts_cover_everything(total, size):
    story.begin(f"{total} elements for {size} ranks")
    end, widths = 0, []
    for rank in range(size):
        part = Shard(rank, size).part_of(total)
        story.tell(f"Shard({rank}, {size}).part_of({total})", f"{part}")
        assert part.total == total, f"Part.total is the number of all elements, {total}"
        assert part.kept.start == end, (
            f"rank {rank} begins with element {part.kept.start}, and the ranks before it end in "
            f"front of element {end}: parts lie behind each other, in the order of the ranks"
        )
        end = part.kept.stop
        widths.append(len(part.kept))
    assert end == total, f"the last rank ends in front of element {end}: {total - end} are nobody's"
    assert max(widths) - min(widths) <= 1, f"parts of {widths} elements differ by more than one"


@st.composite
def models(draw, **options):
    """Sizes of a model with one layer; any number of query heads to a KV head."""
    kv_heads = draw(st.sampled_from([1, 2, 3, 4, 6]))
    return ModelConfig(
        family="llama",
        vocab_size=draw(st.integers(13, 20)),
        hidden_size=6,
        num_layers=1,
        num_heads=kv_heads * draw(st.integers(1, 4)),
        num_kv_heads=kv_heads,
        head_dim=2,
        intermediate_size=draw(st.integers(12, 20)),
        max_positions=16,
        **{name: draw(values) for name, values in options.items()},
    )


@st.composite
def shared(draw, **options):
    """A model, and a number of ranks that can share it."""
    config = draw(models(**options))
    sizes = [size for size in possible_sizes(config) if size <= 12]
    return config, draw(st.sampled_from(sizes))


@pytest.mark.task("18.1")
@examples()
@given(model=shared())
def test_a_rank_has_the_kv_heads_that_its_queries_read(model):
    config, size = model
    group = config.num_heads // config.num_kv_heads
    story.begin(
        f"{config.num_heads} query heads and {config.num_kv_heads} KV heads for {size} ranks: "
        f"query head h reads KV head h // {group}"
    )
    owners = []
    for rank in range(size):
        shard = Shard(rank, size)
        heads, kv_heads = numbers_of(shard.heads(config)), numbers_of(shard.kv_heads(config))
        story.tell(f"rank {rank}", f"query heads {heads}   KV heads {kv_heads}")
        assert shard.heads(config).total == config.num_heads, "total counts all query heads"
        assert shard.kv_heads(config).total == config.num_kv_heads, "total counts all KV heads"
        owners += heads
        for head in heads:
            assert head // group in kv_heads, (
                f"query head {head} reads KV head {head // group}, which is not on its rank {rank}"
            )
        idle = set(kv_heads) - {head // group for head in heads}
        assert not idle, (
            f"nothing on rank {rank} reads KV head {min(idle)}: it would take room in the cache "
            "for nothing"
        )
    assert owners == list(range(config.num_heads)), (
        f"every query head is on one rank, in order; the ranks have {owners}"
    )


# 18.2: rows and columns


def kept_of(shard, config, name, whole):
    """What a rank keeps of a parameter; zeros of what it does not hold."""
    parts = shard.rows(config, name)
    rows = [Part(len(whole), range(len(whole)))] if parts is None else parts
    told = "all rows" if parts is None else f"rows {' + '.join(map(spanned, rows))}"
    total = sum(part.total for part in rows)
    assert total == len(whole), (
        f"{name} has {len(whole)} rows, and `rows` names parts of {total}: one Part for each "
        "matrix that is stacked in it, and a head is head_dim rows"
    )
    pieces = whole.split([part.total for part in rows])
    kept = zip(pieces, (part.kept for part in rows), strict=True)
    whole = torch.cat([piece[span.start : span.stop] for piece, span in kept])
    columns = shard.columns(config, name)
    if columns is not None:
        assert whole.dim() == 2, f"{name} is a vector and has no columns"
        assert columns.total == whole.shape[1], (
            f"{name} has {whole.shape[1]} columns, and `columns` names a part of {columns.total}"
        )
        whole = whole[:, columns.kept.start : columns.kept.stop]
        told += f", columns {spanned(columns)}"
    if not shard.holds(name):
        whole, told = torch.zeros_like(whole), "nothing of it"
    story.tell(f"rank {shard.rank}: {name.removeprefix('layers.0.')}", told)
    return whole.clone()


def spanned(part):
    return f"{part.kept.start}:{part.kept.stop}"


def part_of_decoder(whole, shard, only=None, **collectives):
    """A rank's decoder with its part of the parameters; of these modules alone, if they are named.

    The others have any values.
    """
    config = whole.config
    decoder = Decoder(config, shard, **collectives).double().requires_grad_(False)
    for name, room in decoder.named_parameters():
        if only is None or name.split(".")[-2] in only:
            kept = kept_of(shard, config, name, whole.get_parameter(name))
            assert kept.shape == room.shape, (
                f"rank {shard.rank} keeps {list(kept.shape)} of {name}, and computes with "
                f"{list(room.shape)}: `local_config` and `rows` or `columns` do not agree"
            )
            room.copy_(kept)
    return decoder


def random_decoder(config, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        decoder = Decoder(config).double().requires_grad_(False)
        for parameter in decoder.parameters():
            parameter.normal_()
    return decoder


def attend(layer, query, key, value):
    """Attention of one sequence to itself, each query head to the KV head of its group."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key)
    unseen = torch.ones(len(query), len(key), dtype=torch.bool).triu(1)
    weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def compare(computed, whole, what):
    error = (computed - whole).abs().max().item()
    assert error < 1e-8, (
        f"{what} {error:.2g} away from what one rank computes; below is what each rank keeps"
    )


def begin(config, size):
    story.begin(
        f"{config.num_heads} query and {config.num_kv_heads} KV heads of {config.head_dim}, "
        f"{config.intermediate_size} inner rows, {config.vocab_size} tokens; {size} ranks"
    )


switches = {
    name: st.booleans() for name in ("gated_mlp", "qkv_bias", "output_bias", "mlp_bias", "qk_norm")
}


@pytest.mark.task("18.2")
@examples(20)
@given(model=shared(**switches), seed=st.integers(0, 99))
def test_attention_is_the_sum_of_what_the_ranks_attend(model, seed):
    config, size = model
    whole, summed = random_decoder(config, seed), 0
    begin(config, size)
    x = torch.randn(3, config.hidden_size, dtype=torch.float64)
    for rank in range(size):
        modules = ("qkv_proj", "q_norm", "k_norm", "o_proj")
        part = part_of_decoder(whole, Shard(rank, size), modules)
        summed = summed + part.layers[0]._attention(x, None, attend)
    compare(
        summed,
        whole.layers[0]._attention(x, None, attend),
        "attention, added over all ranks, is up to",
    )


@pytest.mark.task("18.2")
@examples(20)
@given(model=shared(**switches), seed=st.integers(0, 99))
def test_the_mlp_is_the_sum_of_what_the_ranks_compute(model, seed):
    config, size = model
    whole, summed = random_decoder(config, seed), 0
    begin(config, size)
    x = torch.randn(3, config.hidden_size, dtype=torch.float64)
    for rank in range(size):
        part = part_of_decoder(whole, Shard(rank, size), ("up_proj", "down_proj"))
        summed = summed + part.layers[0]._mlp(x)
    compare(summed, whole.layers[0]._mlp(x), "the MLP, added over all ranks, is up to")


@pytest.mark.task("18.2")
@examples(20)
@given(model=shared(), seed=st.integers(0, 99))
def test_the_vocabulary_is_divided(model, seed):
    config, size = model
    whole, embedded, logits = random_decoder(config, seed), 0, []
    begin(config, size)
    tokens = torch.arange(config.vocab_size)
    x = torch.randn(3, config.hidden_size, dtype=torch.float64)
    for rank in range(size):
        part = part_of_decoder(whole, Shard(rank, size), ("embed_tokens", "lm_head"))
        embedded = embedded + part._embed(tokens)
        logits.append(part.lm_head(x))
    compare(embedded, whole._embed(tokens), "the embedding, added over all ranks, is up to")
    compare(
        torch.cat(logits, 1),
        whole.lm_head(x),
        "the logits, the ranks' behind each other, are up to",
    )


@pytest.mark.task("18.2")
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_what_is_small_is_whole_on_every_rank(norm):
    config = dataclasses.replace(tiny_decoder().config, norm=norm, rope=None, qk_norm=True)
    whole = random_decoder(config, 0)
    for name, parameter in whole.named_parameters():
        if "norm" in name or "positions" in name:
            for rank in range(2):
                story.begin("2 ranks")
                kept = kept_of(Shard(rank, 2), config, name, parameter)
                assert torch.equal(kept, parameter), f"rank {rank} needs all of {name}"


# 18.3: the control message

numbers = st.one_of(st.integers(0, 9), st.integers(0, 2**40))
some = st.lists(numbers, max_size=4).map(tuple)
pairs = st.lists(st.builds(BlockCopy, numbers, numbers), max_size=3).map(tuple)
sequences = st.builds(ScheduledSequence, numbers, some, numbers, some, st.booleans())
names = st.lists(st.sampled_from(["A", "B"]), max_size=1).map(tuple)
plans = st.builds(
    StepPlan, st.lists(sequences, max_size=3).map(tuple), pairs, pairs, pairs, names, names
)


def without_names(plan):
    return plan._replace(preempted=(), swapped=())


def told(plan):
    """A plan as it is written, without the fields that are empty."""
    fields = [
        f"{field}=[{', '.join(map(written, items))}]"
        for field, items in plan._asdict().items()
        if items
    ]
    return f"StepPlan({', '.join(fields)})"


def written(item):
    return repr(item) if isinstance(item, str) else f"{type(item).__name__}{tuple(item)}"


@pytest.mark.task("18.3")
@examples()
@given(plan=plans)
def test_a_plan_survives_the_way(plan):
    story.begin()
    story.tell(f"plan = {told(plan)}")
    message = encode_plan(plan)
    story.tell("message = encode_plan(plan)", f"{message.tolist()}")
    assert message.dtype == torch.int64, f"numbers are sent as int64, not as {message.dtype}"
    assert message.dim() == 1, f"a message is one row of numbers, not {list(message.shape)}"
    assert len(message), "a message without numbers means the end; a plan has some, even if empty"
    decoded = decode_plan(message)
    story.tell("decode_plan(message)", told(decoded))
    for field, sent, came in zip(plan._fields, without_names(plan), decoded, strict=True):
        assert came == sent, f"`{field}` was {sent} and comes as {came}"
    for item in decoded.scheduled:
        assert type(item.samples) is bool, (
            f"`samples` comes as {item.samples!r}: the runner picks rows by it, and True and False "
            "choose rows while 1 and 0 are numbers of rows"
        )


@pytest.mark.task("18.3")
@examples()
@given(plan=plans)
def test_a_plan_arrives_as_a_plan(plan):
    story.begin()
    story.tell(f"plan = {told(plan)}")
    decoded = decode_plan(encode_plan(plan))
    assert isinstance(decoded, StepPlan), f"a {type(decoded).__name__} is no StepPlan"
    for item in decoded.scheduled:
        assert isinstance(item, ScheduledSequence), f"{item} is no ScheduledSequence"
        assert isinstance(item.token_ids, tuple), f"token_ids come as {item.token_ids}, no tuple"
    assert decoded.num_tokens == plan.num_tokens
    assert decoded.is_empty == plan.is_empty


# Ranks as threads of this process.  Their process groups are made of memory, and know who waits
# for whom: where real ones would hang, these say why.

PATIENCE = 30.0  # seconds until a rank that neither calls nor ends is said to loop


class Call:
    """One rank's part in a collective."""

    def __init__(self, kind, tensor, receive):
        self.kind, self.tensor = kind, tensor.detach().clone()
        self._receive, self.result = receive, None

    def __str__(self):
        shape = " x ".join(map(str, self.tensor.shape))
        return f"{self.kind} of {shape} {str(self.tensor.dtype).removeprefix('torch.')}"

    def wait(self):
        """Only now are the results there, as with a real group."""
        if self.result is not None:
            self._receive(self.result)
        return True


class Meeting:
    """Where the calls of all ranks meet; counts the bytes of each kind as one rank sees them."""

    def __init__(self, size, tells=False):
        self.size, self.tells = size, tells
        self._bytes = dict.fromkeys(("broadcast", "allreduce", "gather", "allgather"), 0)
        self._calls, self._ended, self._rounds, self._why = {}, {}, 0, ""
        self._changed = threading.Condition()

    def counted(self):
        """By the names that `Traffic` has for them."""
        number = self._bytes
        gathered = number["gather"] + number["allgather"]
        return {
            "control": number["broadcast"],
            "all_reduce": number["allreduce"],
            "gather": gathered,
        }

    def join(self, rank, call):
        """Wait until every rank has called, or it is clear that they never will."""
        with self._changed:
            number = self._rounds
            self._calls[rank] = call
            self._look()
            while self._rounds == number and not self._why:
                if not self._changed.wait(PATIENCE):
                    self._break(f"rank {rank} waits in {call}, and others neither come nor end")
            if self._rounds == number:
                raise AssertionError(self._why)
        return call

    def leave(self, rank, error=None):
        """A rank calls nothing any more."""
        with self._changed:
            self._ended[rank] = error
            self._look()

    def _look(self):
        calls = self._calls
        if len(calls) == self.size:
            if len(set(map(str, calls.values()))) > 1:
                said = "; ".join(f"rank {rank}: {calls[rank]}" for rank in sorted(calls))
                self._break(f"the ranks call different things, and wait for ever: {said}")
                return
            self._hold([calls[rank] for rank in range(self.size)])
            self._calls, self._rounds = {}, self._rounds + 1
            self._changed.notify_all()
        elif calls and len(calls.keys() | self._ended.keys()) == self.size:
            rank, gone = min(calls), min(self._ended)
            how = "fails" if self._ended[gone] else "has no more to do"
            self._break(f"rank {rank} waits for ever in {calls[rank]}, and rank {gone} {how}")

    def _break(self, why):
        self._why = self._why or why
        self._changed.notify_all()

    def _hold(self, calls):
        kind, tensors = calls[0].kind, [call.tensor for call in calls]
        self._bytes[kind] += tensors[0].nbytes
        if self.tells:
            sent = tensors[0].tolist() if kind == "broadcast" else [x.tolist() for x in tensors]
            story.tell(f"all ranks: {calls[0]}", f"{sent}")
        for rank, call in enumerate(calls):
            if kind == "broadcast":
                call.result = tensors[0]
            elif kind == "allreduce":
                call.result = sum(tensors[1:], start=tensors[0])
            elif kind == "allgather" or rank == 0:
                call.result = tensors


class Group:
    """One rank's process group; what a real one has of the collectives that are needed."""

    def __init__(self, meeting, rank):
        self.meeting, self.rank = meeting, rank

    def _call(self, kind, tensor, receive):
        return self.meeting.join(self.rank, Call(kind, tensor, receive))

    def broadcast(self, tensors, *options):
        return self._call("broadcast", tensors[0], tensors[0].copy_)

    def allreduce(self, tensors, *options):
        return self._call("allreduce", tensors[0], tensors[0].copy_)

    def gather(self, outputs, inputs, *options):
        assert bool(outputs) == (self.rank == 0), "rank 0 alone has room for what is gathered"
        return self._call("gather", inputs[0], lambda got: self._fill(outputs[0], got))

    def allgather(self, outputs, inputs, *options):
        return self._call("allgather", inputs[0], lambda got: self._fill(outputs[0], got))

    @staticmethod
    def _fill(room, got):
        assert len(room) == len(got), (
            f"there is room for {len(room)} ranks, and there are {len(got)}"
        )
        for x, y in zip(room, got, strict=True):
            x.copy_(y)


def connected(size, **options):
    """A meeting, and the communicator of every rank."""
    meeting = Meeting(size, **options)
    groups = [Group(meeting, rank) for rank in range(size)]
    return meeting, [
        Communicator(Shard(rank, size), group, group) for rank, group in enumerate(groups)
    ]


class Threads:
    """The ranks other than 0, each in a thread; for a ParallelRunner they are its `ranks`."""

    def __init__(self, meeting, communicators, function):
        self.meeting, self.communicator = meeting, communicators[0]
        self.results, self.errors = {}, []
        self._threads = [
            threading.Thread(target=self._run, args=(rank, function), daemon=True)
            for rank in range(1, meeting.size)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, rank, function):
        error = None
        try:
            self.results[rank] = function(rank)
        except BaseException as caught:
            self.errors.append(caught)
            error = caught
        self.meeting.leave(rank, error)

    def check(self):
        """Nothing is known to have failed: what fails shows at the next meeting."""

    def break_off(self, error):
        """Rank 0 has failed."""
        self.errors.append(error)
        self.meeting.leave(0, error)

    def stop(self):
        """Rank 0 needs the others no more."""
        self.communicator.send_plan(None)

    def join(self):
        """Wait for all, and raise what failed first."""
        self.meeting.leave(0)
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a rank came to no end: look for a loop"
        if self.errors:
            raise self.errors[0]


def on_all_ranks(function, meeting, communicators):
    """What every rank returns for `function(rank)`; rank 0 is this thread."""
    threads = Threads(meeting, communicators, function)
    result = None
    try:
        result = function(0)
    except BaseException as error:
        threads.break_off(error)
    threads.join()
    return [result, *(threads.results[rank] for rank in range(1, meeting.size))]


# 18.4: what the ranks say to each other


@pytest.mark.task("18.4")
@examples(25)
@given(sent=st.lists(plans, max_size=3), size=st.integers(2, 3))
def test_plans_arrive_until_there_are_no_more(sent, size):
    story.begin(f"{size} ranks")
    for plan in sent:
        story.tell(f"rank 0: send_plan({told(plan)})")
    story.tell("rank 0: send_plan(None)", "and the others call receive_plan until it is None")
    meeting, communicators = connected(size)

    def run(rank):
        if rank == 0:
            for plan in sent:
                communicators[0].send_plan(plan)
            return communicators[0].send_plan(None)
        came = []
        while (plan := communicators[rank].receive_plan()) is not None:
            came.append(plan)
            assert len(came) <= len(sent), f"rank {rank} gets a plan that nobody has sent"
        return came

    _, *others = on_all_ranks(run, meeting, communicators)
    for came in others:
        assert came == [without_names(plan) for plan in sent], (
            f"{len(sent)} plans were sent, and {came} came"
        )
    check_counted(meeting, communicators)


def check_counted(meeting, communicators):
    """Every rank has counted the bytes that really went through its hands."""
    for rank, communicator in enumerate(communicators):
        for name, real in meeting.counted().items():
            number = getattr(communicator.payload, name)
            assert number == real, (
                f"`payload.{name}` of rank {rank} is {number} bytes, and {real} bytes were "
                "broadcast, added up or gathered"
            )


matrices = st.tuples(st.integers(1, 3), st.integers(1, 3), st.booleans())


def matrix(rows, columns, is_view, factor=1):
    """Whole numbers; as a view, its elements do not lie behind each other in memory."""
    count = torch.arange(1.0, 1 + rows * columns, dtype=torch.float64).view(rows, columns) * factor
    return count.repeat_interleave(2, dim=1)[:, ::2] if is_view else count


@pytest.mark.task("18.4")
@examples(25)
@given(shape=matrices, size=st.integers(1, 4))
def test_every_rank_gets_the_sum(shape, size):
    rows, columns, is_view = shape
    story.begin(f"{size} ranks; rank r gives (r + 1) times the same matrix, {rows} x {columns}")
    if is_view:
        story.tell("each is every second column of a wider one", "is_contiguous() is False")
    meeting, communicators = connected(size, tells=True)
    sums = on_all_ranks(
        lambda rank: communicators[rank].all_reduce(matrix(*shape, factor=rank + 1)),
        meeting,
        communicators,
    )
    expected = matrix(*shape, factor=size * (size + 1) // 2)
    for rank, got in enumerate(sums):
        assert isinstance(got, torch.Tensor), f"all_reduce returns the sum on rank {rank}"
        assert torch.equal(got, expected), (
            f"rank {rank} returns {got.tolist()}, and the sum is {expected.tolist()}"
        )
    check_counted(meeting, communicators)


@pytest.mark.task("18.4")
@examples(25)
@given(rows=st.integers(0, 3), vocab_size=st.integers(4, 11), size=st.integers(2, 4))
def test_rank_0_gets_the_logits_of_all_tokens(rows, vocab_size, size):
    story.begin(f"{rows} rows of logits for {vocab_size} tokens on {size} ranks")
    meeting, communicators = connected(size)
    whole = torch.arange(float(rows * vocab_size), dtype=torch.float64).view(rows, vocab_size)
    parts = []
    for rank in range(size):
        columns = Shard(rank, size).part_of(vocab_size).kept
        parts.append(whole[:, columns.start : columns.stop])
        story.tell(f"rank {rank} has columns {list(columns)}")
    got, *_ = on_all_ranks(
        lambda rank: communicators[rank].gather_logits(parts[rank], vocab_size),
        meeting,
        communicators,
    )
    assert got.shape == whole.shape, (
        f"rank 0 returns {list(got.shape)}; wanted are {rows} rows of {vocab_size} tokens"
    )
    assert torch.equal(got, whole), f"rank 0 has {got.tolist()} and should have {whole.tolist()}"
    check_counted(meeting, communicators)


def serve(workload, engine):
    """Tokens of each request, and the plan and the logits of each step."""
    steps, execute = [], engine.runner.execute

    def remember(plan):
        logits = execute(plan)
        steps.append((plan, logits.clone()))
        return logits

    engine.runner.execute = remember
    outputs, _ = workload.run(engine)
    return {i: [c.token_ids for c in output.outputs] for i, output in outputs.items()}, steps


def on_ranks(workload, size):
    """The same on an engine whose runner has `size` ranks."""
    meeting, communicators = connected(size)
    decoders = [part_of_decoder(workload.decoder, c.shard, collectives=c) for c in communicators]
    story.begin(f"{size} ranks")
    options = workload.options(decoders[0])
    engine = build_engine(decoders[0], None, options)
    runners = [build_runner(decoder, workload.num_blocks, options) for decoder in decoders]
    threads = Threads(meeting, communicators, lambda rank: work(runners[rank], communicators[rank]))
    engine.runner = ParallelRunner(engine.runner, threads)
    served = None
    try:
        served = serve(workload, engine)
        engine.runner.close()
    except BaseException as error:
        threads.break_off(error)
    finally:
        engine.runner.close.detach()
        threads.join()
    check_counted(meeting, communicators)
    return served


long = {"max_tokens": 8, "ignore_eos": True}
crowds = st.builds(
    lambda prompt, pool, budget, preemption: Workload(
        (
            Request((1, 2, 4, 7, 12), {**long, "temperature": 1.0}),
            Request(prompt, {**long, "n": 2, "temperature": 1.0}),
            Request((11,), {**long, "temperature": 0.0}),
        ),
        *(2, pool, 4, budget),
        preemption=preemption,
        num_host_blocks=pool if preemption == "swap" else 0,
    ),
    st.lists(st.integers(4, 12), min_size=1, max_size=5).map(tuple),
    st.integers(13, 17),
    st.integers(5, 9),
    st.sampled_from(["swap", "recompute"]),
)


@pytest.mark.task("18.4")
@examples(8)
@given(workload=crowds, size=st.sampled_from([2, 4]))
def test_k_ranks_equal_one(workload, size):
    alone = build_engine(workload.decoder, None, workload.options(workload.decoder))
    tokens, steps = serve(workload, alone)
    tokens_of_ranks, steps_of_ranks = on_ranks(workload, size)
    for number, ((plan, logits), (their_plan, theirs)) in enumerate(
        zip(steps, steps_of_ranks, strict=True)
    ):
        story.tell(f"step {number}: {told(without_names(plan))}")
        assert their_plan == plan, f"with {size} ranks the plan of step {number} is {their_plan}"
        assert theirs.shape == logits.shape, (
            f"{list(theirs.shape)} logits, not {list(logits.shape)}"
        )
        if len(logits):
            error = (theirs - logits).abs().max().item()
            assert error < 1e-8, (
                f"the logits of {size} ranks differ by {error:.2g} from those of one in step "
                f"{number}; nan means that a rank read a block that it had not written"
            )
    assert tokens_of_ranks == tokens, f"{tokens_of_ranks} with {size} ranks, {tokens} with one"


@pytest.mark.task("18.4")
def test_the_crowds_need_swaps_and_copies():
    """That what was just compared has every kind of block move in it."""
    workload = Workload(
        (
            Request((1, 2, 4, 7, 12), {**long, "temperature": 1.0}),
            Request((5, 9, 10), {**long, "n": 2, "temperature": 1.0}),
            Request((11,), {**long, "temperature": 0.0}),
        ),
        *(2, 13, 4, 6),
        preemption="swap",
        num_host_blocks=13,
    )
    _, steps = on_ranks(workload, 2)
    for field in ("swap_out", "swap_in", "copies"):
        assert any(getattr(plan, field) for plan, _ in steps), f"no step has {field}"


@pytest.mark.task("18.4")
def test_real_process_groups():
    """The same through gloo, as the processes of a real model do it."""
    size, vocab_size = 3, 7
    story.begin(f"{size} ranks, connected by gloo; one that waits gives up after 10 s")
    store, communicators = dist.HashStore(), {}
    plan = StepPlan((ScheduledSequence(4, (7, 8), 0, (3,), True),), copies=(BlockCopy(1, 2),))
    whole = torch.arange(2.0 * vocab_size).view(2, vocab_size)

    def run(rank):
        group = gloo_group(store, Shard(rank, size), "127.0.0.1")
        group._set_default_timeout(timedelta(seconds=10))
        communicator = communicators[rank] = Communicator(Shard(rank, size), group, group)
        came = communicator.send_plan(plan) if rank == 0 else communicator.receive_plan()
        summed = communicator.all_reduce(matrix(3, 2, True))
        columns = Shard(rank, size).part_of(vocab_size).kept
        logits = communicator.gather_logits(whole[:, columns.start : columns.stop], vocab_size)
        return came, summed, logits

    (_, _, logits), *others = results = on_all_ranks(run, Meeting(size), [None] * size)
    assert torch.equal(logits, whole), f"rank 0 has {logits.tolist()}, not {whole.tolist()}"
    for _, summed, _ in results:
        assert torch.equal(summed, 3 * matrix(3, 2, True)), f"the sum came as {summed.tolist()}"
    assert [came for came, _, _ in others] == [plan] * 2, "the plan did not arrive"


# 18.5: what it costs

BLOCK_SIZE, NUM_BLOCKS = 2, 15


@st.composite
def steps(draw):
    """Any plan that a runner can carry out: its blocks are there, and each has one owner."""
    blocks = draw(st.permutations(range(NUM_BLOCKS)))
    scheduled = []
    for seq_id in range(draw(st.integers(0, 3))):
        before, new = draw(st.integers(0, 3)), draw(st.integers(1, 3))
        table = [blocks.pop() for _ in range(-(-(before + new) // BLOCK_SIZE))]
        tokens = draw(st.lists(st.integers(0, 12), min_size=new, max_size=new))
        scheduled.append(
            ScheduledSequence(seq_id, tuple(tokens), before, tuple(table), draw(st.booleans()))
        )
    moves = []
    for _ in range(3):
        number = draw(st.integers(0, 1))
        moves.append(tuple(BlockCopy(blocks.pop(), blocks.pop()) for _ in range(number)))
    return StepPlan(tuple(scheduled), *moves)


@pytest.mark.task("18.5")
@examples(30)
@given(plan=steps(), size=st.sampled_from([2, 4]), dtype=st.sampled_from(["float64", "float32"]))
def test_the_formula_is_what_is_counted(plan, size, dtype):
    dtype = getattr(torch, dtype)
    meeting, communicators = connected(size)
    whole = tiny_decoder()
    decoders = [part_of_decoder(whole, c.shard, collectives=c).to(dtype) for c in communicators]
    options = EngineOptions(block_size=BLOCK_SIZE, preemption="swap", attention="torch")
    runners = [build_runner(decoder, NUM_BLOCKS, options) for decoder in decoders]

    def run(rank):
        if rank > 0:
            return work(runners[rank], communicators[rank])
        communicators[0].send_plan(plan)
        runners[0].execute(plan)
        counted = meeting.counted()
        communicators[0].send_plan(None)
        return counted

    story.begin(
        f"{size} ranks in {dtype}; {whole.config.num_layers} layers, hidden size "
        f"{whole.config.hidden_size}, {whole.config.vocab_size} tokens"
    )
    story.tell(f"plan = {told(plan)}", f"{plan.num_tokens} tokens")
    counted, *_ = on_all_ranks(run, meeting, communicators)
    formula = step_traffic(whole.config, plan, size, dtype.itemsize)
    story.tell(f"step_traffic(config, plan, {size}, {dtype.itemsize})", f"{formula}")
    for name, real in counted.items():
        number = getattr(formula, name)
        assert number == real, f"`{name}` is {number} bytes by the formula, and {real} were counted"


def bytes_sent_by_rings(chunk, size):
    """Count what ranks send when they add up `size` chunks each, in a ring."""
    sent = 0
    sums = [[{rank} for _ in range(size)] for rank in range(size)]  # whose terms are in each chunk
    for turn in range(2 * (size - 1)):
        moving = {}
        for rank in range(size):
            number = (rank - turn) % size
            if turn >= size - 1:  # every chunk is complete on some rank, and goes round
                number = (rank + 1 - (turn - size + 1)) % size
            moving[(rank + 1) % size] = (number, sums[rank][number])
            sent += chunk
        for rank, (number, terms) in moving.items():
            sums[rank][number] = sums[rank][number] | terms
    everybody = set(range(size))
    assert all(terms == everybody for chunks in sums for terms in chunks)
    return sent


@pytest.mark.task("18.5")
@examples()
@given(
    control=st.integers(0, 99),
    chunk=st.integers(0, 99),
    gather=st.integers(0, 99),
    size=st.integers(1, 6),
)
def test_what_goes_over_the_wire(control, chunk, gather, size):
    traffic = Traffic(control, chunk * size, gather)
    story.begin(f"{size} ranks, and a ring for the all-reduce")
    parts = {
        "the plan goes to each of the others": (size - 1) * control,
        "a ring adds up": bytes_sent_by_rings(chunk, size),
        "each of the others sends logits": (size - 1) * gather,
    }
    for what, number in parts.items():
        story.tell(what, f"{number} bytes")
    got = traffic.on_the_wire(size)
    story.tell(f"{traffic}.on_the_wire({size})", f"{got}")
    assert got == sum(parts.values()), f"{sum(parts.values())} bytes are sent, not {got}"
