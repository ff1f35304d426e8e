"""Lesson 15: from logits to text, one step after the other (T4, scheduling invariance)."""

import itertools
import math

import numpy as np
import pytest
import torch
from effort import at_most
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import EOS, Request, Workload, check_output, tiny_decoder, workloads

from minipaged.attention import attention_backend
from minipaged.course.narration import story
from minipaged.course.notation import name
from minipaged.decoding import sampler
from minipaged.decoding.sampler import Draw, sample, token_distribution
from minipaged.decoding.stopping import num_held_back, stop_by_string, stop_by_token
from minipaged.engine.model_runner import ModelRunner
from minipaged.engine.naive import ContiguousCache
from minipaged.engine.trace import Trace
from minipaged.memory.kv_cache import KVCache, KVCacheShape
from minipaged.request.sampling_params import SamplingParams
from minipaged.request.sequence import Sequence
from minipaged.scheduling.step_plan import ScheduledSequence, StepPlan

pytestmark = pytest.mark.usefixtures("one_thread")


def code(params):
    """Sampling parameters as they are written, without those that are left alone."""
    usual = SamplingParams()
    chosen = {name: value for name, value in vars(params).items() if value != getattr(usual, name)}
    return f"SamplingParams({', '.join(f'{field}={value!r}' for field, value in chosen.items())})"


def rounded(values):
    return "[" + ", ".join(f"{value:.3f}" for value in values) + "]"


# 15.1: what is drawn from

# On a coarse grid, so that ties are common and no threshold is hit by rounding.
logit_rows = st.lists(st.integers(-8, 8).map(lambda i: i / 4), min_size=2, max_size=8)
shapes = st.builds(
    SamplingParams,
    temperature=st.sampled_from([1.0, 0.5, 1.9]),
    top_k=st.sampled_from([0, 1, 2, 3, 20]),
    top_p=st.sampled_from([1.0, 0.913, 0.371, 0.113]),
    min_p=st.sampled_from([0.0, 0.0517, 0.317]),
)


def softmax(logits):
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def distribution(logits, params):
    """By the definition, one token after the other."""
    probabilities = softmax([logit / params.temperature for logit in logits])
    least = params.min_p * max(probabilities)
    left = [p if p >= least else 0.0 for p in probabilities]
    likeliest = sorted(range(len(left)), key=lambda token: (-left[token], token))
    if params.top_k > 0:
        for token in likeliest[params.top_k :]:
            left[token] = 0.0
    if params.top_p < 1:
        total, mass = sum(left), 0.0
        for token in likeliest:
            if mass >= params.top_p * total:
                left[token] = 0.0
            mass += left[token]
    return [p / sum(left) for p in left]


def tell_distribution(rows, params):
    story.begin()
    story.tell(f"logits = torch.tensor({rows}, dtype=torch.float64)")
    for row, p in enumerate(params):
        story.tell(
            f"params_{row} = {code(p)}", f"softmax of row {row}: {rounded(softmax(rows[row]))}"
        )
    names = ", ".join(f"params_{row}" for row in range(len(params)))
    story.tell(f"token_distribution(logits, [{names}])")


@pytest.mark.task("15.1")
@given(logits=logit_rows, params=shapes)
@example(logits=[2.0, 1.75, 0.0, 0.0], params=SamplingParams(top_k=2, top_p=0.5))
def test_the_distribution_is_that_of_the_definition(logits, params):
    tell_distribution([logits], [params])
    (got,) = token_distribution(torch.tensor([logits], dtype=torch.float64), [params]).tolist()
    expected = distribution(logits, params)
    for token, (p, q) in enumerate(zip(got, expected, strict=True)):
        assert p == pytest.approx(q, abs=1e-9), (
            f"token {token} has the probability {p:.3f} and should have {q:.3f}; "
            f"all: {rounded(got)}, and should be {rounded(expected)}"
        )


@pytest.mark.task("15.1")
@at_most(40)
@given(data=st.data(), size=st.integers(2, 6), params=st.lists(shapes, min_size=2, max_size=3))
def test_each_row_has_its_own_parameters(data, size, params):
    row = st.lists(st.integers(-8, 8).map(lambda i: i / 4), min_size=size, max_size=size)
    rows = [data.draw(row) for _ in params]
    tell_distribution(rows, params)
    together = token_distribution(torch.tensor(rows, dtype=torch.float64), params).tolist()
    for number, (got, logits, p) in enumerate(zip(together, rows, params, strict=True)):
        expected = distribution(logits, p)
        assert got == pytest.approx(expected, abs=1e-9), (
            f"row {number} is {rounded(got)}; by its own parameters it should be "
            f"{rounded(expected)}"
        )


@pytest.mark.task("15.1")
@pytest.mark.parametrize(("size", "top_p", "kept"), [(4, 0.5, 2), (4, 0.25, 1), (8, 0.75, 6)])
def test_no_token_more_than_top_p_needs(size, top_p, kept):
    params = SamplingParams(top_p=top_p)
    tell_distribution([[0.0] * size], [params])
    (got,) = token_distribution(torch.zeros(1, size, dtype=torch.float64), [params]).tolist()
    number = sum(p > 0 for p in got)
    assert number == kept, (
        f"{size} tokens have the probability 1/{size} each, so the first {kept} reach {top_p} "
        f"exactly, and no other is needed; {number} are left"
    )


@pytest.mark.task("15.1")
def test_a_tiny_temperature_does_not_overflow():
    params = SamplingParams(temperature=1e-9)
    tell_distribution([[30.0, 29.0, -1e30]], [params])
    (got,) = token_distribution(torch.tensor([[30.0, 29.0, -1e30]]), [params]).tolist()
    assert got == [1.0, 0.0, 0.0], (
        f"at a temperature near 0 the likeliest token has all the probability, not {got}: "
        "take the largest logit off all of them first, and do not divide by less than 1e-6"
    )


# 15.2: draw a token

weights = st.lists(st.integers(0, 4), min_size=1, max_size=8).filter(any)


@pytest.mark.task("15.2")
@given(weights=weights, data=st.data(), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_a_number_falls_into_the_piece_of_its_token(weights, data, dtype):
    total = sum(weights)
    piece = data.draw(st.integers(0, total - 1))
    uniform = (piece + 0.5) / total
    expected = next(t for t, end in enumerate(itertools.accumulate(weights)) if end > piece)
    story.begin()
    story.tell(f"probabilities = torch.tensor([{weights}]) / {total}")
    story.tell(
        f"_invert(probabilities, torch.tensor([{uniform:.3f}]))",
        f"cumulative: {rounded(end / total for end in itertools.accumulate(weights))}",
    )
    probabilities = torch.tensor([weights], dtype=dtype) / total
    got = sampler._invert(probabilities, torch.tensor([uniform], dtype=torch.float64)).tolist()
    assert got == [expected], f"{uniform:.3f} lies in the piece of token {expected}, not of {got}"


@pytest.mark.task("15.2")
@given(weights=weights, at=st.sampled_from([0.0, 1 - 2**-53]))
def test_the_ends_of_the_line_belong_to_possible_tokens(weights, at):
    story.begin("float32 rounds, so that the sum of the probabilities is a little less than 1")
    story.tell(f"probabilities = torch.tensor([{weights}]) / {sum(weights)} * (1 - 1e-6)")
    story.tell(f"_invert(probabilities, torch.tensor([{at!r}]))")
    probabilities = torch.tensor([weights], dtype=torch.float32) / sum(weights) * (1 - 1e-6)
    (got,) = sampler._invert(probabilities, torch.tensor([at], dtype=torch.float64)).tolist()
    assert 0 <= got < len(weights), f"token {got} is none of the {len(weights)} tokens there are"
    assert weights[got] > 0, f"token {got} has the probability 0 and was drawn"


def draws_of(params, output=()):
    """A draw for each, with streams of their own."""
    draws = []
    for number, p in enumerate(params):
        sequence = Sequence(number, [0, 1], (7, number))
        sequence.token_ids += output
        draws.append(Draw(sequence, p))
    return draws


wishes = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1.0, 1.0, 3.0]),
    top_k=st.sampled_from([0, 0, 2]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 4.0]),
)


@pytest.mark.task("15.2")
@at_most(50)
@given(params=st.lists(wishes, min_size=2, max_size=5), seed=st.integers(0, 99))
def test_a_token_does_not_depend_on_the_others_of_the_batch(params, seed):
    story.begin("every sequence has the stream of its own key (7, number)")
    logits = torch.from_numpy(np.random.default_rng(seed).normal(0, 2, (len(params), 12)))
    alone = []
    for row, (p, draw) in enumerate(zip(params, draws_of(params), strict=True)):
        (token,) = sample(logits[row : row + 1], [draw])
        alone.append(token.token_id)
        story.tell(f"row {row}: {code(p)}", f"alone: token {token.token_id}")
    together = [token.token_id for token in sample(logits, draws_of(params))]
    story.tell("all rows in one batch", f"tokens {together}")
    for row, (a, b) in enumerate(zip(alone, together, strict=True)):
        assert a == b, f"row {row} draws token {a} alone, and {b} when others are in the batch"


@pytest.mark.task("15.2")
@at_most(30)
@given(rows=st.lists(logit_rows.filter(lambda row: len(row) > 3), min_size=1, max_size=3))
def test_temperature_0_takes_the_likeliest(rows):
    rows = [row[:4] for row in rows]
    story.begin()
    story.tell(f"sample(torch.tensor({rows}), ...)", "temperature=0 for every row")
    params = [SamplingParams(temperature=0, logprobs=0, presence_penalty=2.0)] * len(rows)
    tokens = sample(torch.tensor(rows), draws_of(params))
    for row, token in zip(rows, tokens, strict=True):
        best = row.index(max(row))
        assert token.token_id == best, f"of {row} token {best} is the likeliest"
        logprob = token.logprobs[best].logprob
        expected = math.log(softmax(row)[best])
        assert logprob == pytest.approx(expected, abs=1e-5), (
            f"the log-probability that is reported is the model's own, {expected:.3f}, not "
            f"{logprob:.3f}"
        )
    penalty = SamplingParams(temperature=0, logprobs=0, presence_penalty=2.0)
    (token,) = sample(torch.tensor([[1.0, 0.0]]), draws_of([penalty], output=[0]))
    assert token.token_id == 1, "token 0 stood in the output and was to be made less likely by 2"
    expected = math.log(softmax([1.0, 0.0])[1])
    assert token.logprobs[1].logprob == pytest.approx(expected, abs=1e-5), (
        "log-probabilities are reported as they are before penalties"
    )


@pytest.mark.task("15.2")
def test_logits_of_16_bits_are_made_32_first():
    rows = [[3.0, 2.5, -1.0, 0.5], [0.0, 0.25, 0.125, 7.0]]  # exact in bfloat16
    story.begin()
    story.tell(f"sample(torch.tensor({rows}, dtype=torch.bfloat16), ...)")
    params = [SamplingParams(temperature=0, logprobs=0)] * len(rows)
    for row, token in zip(
        rows, sample(torch.tensor(rows, dtype=torch.bfloat16), draws_of(params)), strict=True
    ):
        got, expected = token.logprobs[token.token_id].logprob, math.log(max(softmax(row)))
        assert got == pytest.approx(expected, abs=1e-5), (
            f"the log-probability is {expected:.6f}, not {got:.6f}: in 16 bits it is rounded"
        )


@pytest.mark.task("15.2")
def test_draws_are_as_frequent_as_they_are_probable():
    shares = [0.1, 0.2, 0.3, 0.4]
    story.begin()
    story.tell("2,000 draws of one sequence from [0.1, 0.2, 0.3, 0.4]")
    logits = torch.log(torch.tensor([shares], dtype=torch.float64))
    (draw,) = draws_of([SamplingParams()])
    counts = np.bincount([sample(logits, [draw])[0].token_id for _ in range(2000)], minlength=4)
    assert counts / 2000 == pytest.approx(shares, abs=0.04), (
        f"drawn {counts.tolist()} times; each draw takes the next number of the stream"
    )


# 15.3: when it ends


@pytest.mark.task("15.3")
@given(
    prompt=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    output=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    ends=st.lists(st.integers(0, 3), max_size=2).map(tuple),
    max_tokens=st.integers(1, 5),
)
def test_an_output_ends_with_an_end_token_or_the_last_that_is_allowed(
    prompt, output, ends, max_tokens
):
    story.begin(f"end tokens: {ends}, max_tokens: {max_tokens}")
    sequence = Sequence(0, prompt)
    for number, token in enumerate(output, start=1):
        sequence.token_ids.append(token)
        got = stop_by_token(sequence, ends, max_tokens)
        story.tell(f"prompt {prompt}, output {output[:number]}", f"-> {got!r}")
        expected = "stop" if token in ends else "length" if number == max_tokens else None
        assert got == expected, (
            f"the last token is {token}, the {number}. of {max_tokens} of output: "
            f"{expected!r} is right"
        )
        if expected is not None:
            return


stops = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)
pieces = st.lists(st.text("ab", max_size=4), max_size=6)


@pytest.mark.task("15.3")
@given(pieces=pieces, stops=stops, include=st.booleans())
def test_a_stop_string_is_found_wherever_tokens_begin_and_end(pieces, stops, include):
    params = SamplingParams(stop=stops, include_stop_str_in_output=include)
    story.begin(f"{code(params)}; every token adds a piece")
    text = ""
    stop_by_string(text, 0, params)
    for piece in pieces:
        text += piece
        found = sorted((text.find(stop), len(stop)) for stop in stops if stop in text)
        cut = stop_by_string(text, len(piece), params)
        story.tell(f"text = {text!r}", f"the last piece is {piece!r}; cut to {cut}")
        if found:
            place, length = found[0]
            expected = place + length if include else place
            assert cut == expected, (
                f"{text[place : place + length]!r} begins at character {place}, so the text is "
                f"cut to {text[:expected]!r}, {expected} characters, not to {cut}"
            )
            return
        assert cut is None, "there is no stop string in it"


@pytest.mark.task("15.3")
@given(pieces=pieces, stops=stops, include=st.booleans())
def test_nothing_is_shown_that_is_cut_off_later(pieces, stops, include):
    params = SamplingParams(stop=stops, include_stop_str_in_output=include)
    story.begin(f"{code(params)}; every token adds a piece")
    held_back = num_held_back(params)
    text = shown = ""
    for piece in pieces:
        text += piece
        cut = stop_by_string(text, len(piece), params)
        if cut is not None:
            story.tell(f"text = {text!r}", f"cut to {text[:cut]!r}")
            assert text[:cut].startswith(shown), (
                f"{shown!r} was shown already, and only {text[:cut]!r} belongs to the output"
            )
            return
        shown = text[: max(len(shown), len(text) - held_back)]
        story.tell(f"text = {text!r}", f"{held_back} characters held back; shown: {shown!r}")


@pytest.mark.task("15.3")
def test_no_more_is_held_back_than_needed():
    story.begin()
    for stop, include, expected in [((), False, 0), ("ab", False, 1), (["ab", "a"], True, 0)]:
        params = SamplingParams(stop=stop, include_stop_str_in_output=include)
        got = num_held_back(params)
        story.tell(f"num_held_back({code(params)})", f"-> {got}")
        assert got == expected, f"with {code(params)} {expected} characters may have to be cut off"


# 15.4: carry out a plan

BLOCKS, HOST_BLOCKS = 24, 6


def tiny_runner(block_size, seed=0):
    """A runner over a cache in which every slot that nobody wrote is NaN."""
    decoder = tiny_decoder(seed)
    config = decoder.config
    shape = KVCacheShape(
        config.num_layers, BLOCKS, block_size, config.num_kv_heads, config.head_dim, HOST_BLOCKS
    )
    cache = KVCache(shape, torch.float64, debug=True)
    return ModelRunner(decoder, cache, attention_backend("torch"))


def logits_alone(token_ids, seed=0):
    """Logits behind the last token, over contiguous keys and values."""
    cache = ContiguousCache()
    with torch.inference_mode():
        positions = torch.arange(len(token_ids))
        return tiny_decoder(seed)(torch.tensor(token_ids), positions, cache.attend)[-1]


def tell_plan(plan):
    for moves in ("swap_out", "swap_in", "copies"):
        if pairs := getattr(plan, moves):
            story.tell(f"  {moves}: {list(map(tuple, pairs))}")
    for item in plan.scheduled:
        samples = "samples" if item.samples else "does not sample"
        story.tell(
            f"  {name(item.seq_id)}: tokens {list(item.token_ids)}",
            f"behind {item.num_computed_tokens}, blocks {list(item.block_table)}, {samples}",
        )


def execute(runner, plan):
    story.tell("runner.execute(plan), with this plan:")
    tell_plan(plan)
    return runner.execute(plan)


def check_logits(logits, plan, sequences):
    """Every row is that of the sequence that samples, alone."""
    sampling = [item for item in plan.scheduled if item.samples]
    assert len(logits) == len(sampling), (
        f"{len(sampling)} sequences of the plan sample, and there are {len(logits)} rows"
    )
    for row, item in zip(logits, sampling, strict=True):
        expected = logits_alone(sequences[item.seq_id][: item.context_length])
        if torch.allclose(row, expected, atol=1e-9):
            continue
        who = name(item.seq_id)
        assert not row.isnan().any(), f"for sequence {who} a slot was read that nobody wrote"
        others = [
            name(other.seq_id)
            for other in plan.scheduled
            if torch.allclose(row, logits_alone(sequences[other.seq_id][: other.context_length]))
        ]
        what = f"they are those of {others[0]}" if others else "nobody's"
        raise AssertionError(f"the logits of sequence {who} are not those it has alone: {what}")


@pytest.mark.task("15.4")
@at_most(30)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    block_size=st.integers(1, 4),
    data=st.data(),
)
def test_every_row_is_that_of_its_sequence_alone(lengths, block_size, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    sequences = [rng.integers(0, 13, length).tolist() for length in lengths]
    free = rng.permutation(BLOCKS).tolist()[: sum(-(-length // block_size) for length in lengths)]
    tables = [[free.pop() for _ in range(-(-len(s) // block_size))] for s in sequences]
    story.begin(f"blocks of {block_size} tokens")
    runner = tiny_runner(block_size)
    done = [0] * len(sequences)
    while any(n < len(s) for n, s in zip(done, sequences, strict=True)):
        items = []
        for i in data.draw(st.permutations(range(len(sequences)))):
            left = len(sequences[i]) - done[i]
            n = data.draw(st.integers(0 if items else min(1, left), left))
            if n:
                end = done[i] + n
                table = tuple(tables[i][: -(-end // block_size)])
                tokens = tuple(sequences[i][done[i] : end])
                items.append(ScheduledSequence(i, tokens, done[i], table, end == len(sequences[i])))
                done[i] = end
        if not items:
            continue
        plan = StepPlan(tuple(items))
        check_logits(execute(runner, plan), plan, sequences)


@pytest.mark.task("15.4")
@at_most(50)
@given(
    swap_out=st.dictionaries(st.integers(0, 3), st.integers(0, 5), max_size=2),
    swap_in=st.dictionaries(st.integers(0, 3), st.integers(0, 5), max_size=2),
    copies=st.dictionaries(st.integers(4, 7), st.integers(0, 3), max_size=2),
)
def test_blocks_move_in_the_order_of_the_plan(swap_out, swap_in, copies):
    story.begin("device block b holds the number b, host block h holds 100 + h")
    runner = tiny_runner(2)
    cache = runner.cache
    device = {block: float(block) for block in range(BLOCKS)}
    host = {block: 100.0 + block for block in range(HOST_BLOCKS)}
    for pool in (cache.keys, cache.values):
        for layer in pool:
            layer[:] = torch.arange(float(BLOCKS))[:, None, None, None]
    for block, number in host.items():
        cache._host[:, :, block] = number
    plan = StepPlan(
        swap_out=tuple((source, target) for source, target in swap_out.items()),
        swap_in=tuple((source, target) for target, source in swap_in.items()),
        copies=tuple((source, target) for target, source in copies.items()),
    )
    # Where two leave for the same host block, the last would win: each goes to one of its own.
    if len(set(swap_out.values())) < len(swap_out):
        plan = plan._replace(swap_out=plan.swap_out[:1])
    logits = execute(runner, plan)
    assert tuple(logits.shape) == (0, 13), (
        f"nobody is scheduled, so there are no rows of 13 logits; the shape is {logits.shape}"
    )
    host |= {target: device[source] for source, target in plan.swap_out}
    device |= {target: host[source] for source, target in plan.swap_in}
    device |= {target: device[source] for source, target in plan.copies}
    for block, number in device.items():
        got = {layer[block].unique().tolist()[0] for layer in (*cache.keys, *cache.values)}
        assert got == {number}, (
            f"device block {block} should hold {number:g} and holds {got}: out, then in, then copy"
        )
    for block, number in host.items():
        got = set(cache._host[:, :, block].unique().tolist())
        assert got == {number}, f"host block {block} should hold {number:g} and holds {got}"


@pytest.mark.task("15.4")
@pytest.mark.parametrize("length", [3, 5])
def test_a_shared_block_is_copied_before_it_is_written(length):
    story.begin("A and B share their blocks of 4 tokens; B writes, and its last one is copied")
    runner = tiny_runner(4)
    prompt = [1, 5, 2, 8, 4][:length]
    table = tuple(range(-(-length // 4)))
    first = StepPlan((ScheduledSequence(0, tuple(prompt), 0, table, True),))
    check_logits(execute(runner, first), first, [prompt])
    copied = (*table[:-1], 9)
    plan = StepPlan(
        (
            ScheduledSequence(1, (7,), length, copied, True),
            ScheduledSequence(0, (6,), length, table, True),
        ),
        copies=((table[-1], 9),),
    )
    check_logits(execute(runner, plan), plan, [[*prompt, 6], [*prompt, 7]])


# 15.5: step


class Life:
    """An engine that serves a workload, telling what it does."""

    def __init__(self, workload, title=""):
        story.begin(title)
        self.workload = workload
        self.engine = workload.engine()
        draw = self.engine._branching.draw

        def checked_draw(growing, logits):
            assert len(growing) == len(logits), (
                f"{len(growing)} outputs are to get a token from {len(logits)} rows of logits; "
                "only sequences whose item of the plan samples get one"
            )
            return draw(growing, logits)

        self.engine._branching.draw = checked_draw
        story.tell(
            f"engine: {workload.num_blocks} blocks of {workload.block_size} tokens, "
            f"{workload.max_num_batched_tokens} tokens a step"
        )
        self.arrivals = 0
        self.asked = {}  # request id -> (request, how many arrived before it)
        self.outputs = {}  # the last ones

    def add(self, number):
        request = self.workload.requests[number]
        params = SamplingParams(**request.params)
        self.engine.add_request(str(number), request.prompt, params, request.priority)
        self.asked[str(number)] = request, self.arrivals
        self.arrivals += 1
        story.tell(f'engine.add_request("{number}", {list(request.prompt)}, {code(params)})')

    def step(self):
        story.start_call("engine.step()")
        outputs = self.engine.step()
        tokens = {o.request_id: [c.token_ids for c in o.outputs] for o in outputs}
        story.end_call(f"  -> {tokens}", self.state())
        self.check_books()
        self.outputs |= {output.request_id: output for output in outputs}
        return outputs

    def abort(self, request_id):
        story.start_call(f'engine.abort("{request_id}")')
        output = self.engine.abort(request_id)
        story.end_call("", self.state())
        self.check_books()
        return output

    def state(self):
        manager = self.engine.scheduler.manager
        tables = [
            f"table {name(seq_id)}: {table.blocks} {table.num_tokens} tokens   "
            for seq_id, table in manager.tables.items()
        ]
        return f"{''.join(tables)}{manager.device.num_free} of {manager.device.num_blocks} free"

    def check_books(self):
        """Between two steps queues, tables and requests agree."""
        scheduler, listed = self.engine.scheduler, set(self.engine._requests)
        queued = {group.request_id for group in [*scheduler.running, *scheduler.waiting]}
        gone = sorted(listed - queued)
        assert not gone, f"requests {gone} have ended and are still in self._requests"
        lost = sorted(queued - listed)
        assert not lost, (
            f"requests {lost} are not in self._requests any more, and the scheduler still has "
            "them, with their blocks: they were not released"
        )
        try:
            self.engine.check_integrity()
        except AssertionError as error:
            raise AssertionError(
                f"between two steps the books must agree, and do not: {error or 'see the state'}"
            ) from None

    def run(self):
        """Everything comes and goes when it should."""
        requests = self.workload.requests
        pending = sorted(range(len(requests)), key=lambda i: requests[i].arrival)
        for step in itertools.count():
            while pending and requests[pending[0]].arrival <= step:
                self.add(pending.pop(0))
            for number, request in enumerate(requests):
                if request.abort_at == step:
                    self.abort(str(number))
            self.step()
            if not pending and not self.engine.has_unfinished_requests:
                return
            assert step < 2000, "after 2,000 steps requests are still unfinished"

    def check(self):
        """Every request got what it gets alone, naively generated."""
        for request_id, (request, arrival) in self.asked.items():
            expected = request.expected(self.workload.decoder, arrival)
            output = self.outputs.get(request_id)
            got = output and [completion.token_ids for completion in output.outputs]
            try:
                check_output(request, output, expected)
            except AssertionError:
                raise AssertionError(
                    f"request {request_id} got {got}; served alone it gets "
                    f"{[tokens for tokens, _ in expected]}"
                ) from None
        used = self.engine.scheduler.manager.device.num_used
        assert used == 0, f"all requests have ended, and {used} blocks are still in use"


def one_by_one(prompt, **options):
    """A single request."""
    request = Request(tuple(prompt), {"temperature": 0.0, "ignore_eos": True, **options})
    return Workload((request,), 2, 12, 4, 4)


@pytest.mark.task("15.5")
@at_most(25)
@given(prompt=st.lists(st.integers(0, 12), min_size=1, max_size=11), tokens=st.integers(1, 5))
def test_a_step_returns_those_who_got_a_token(prompt, tokens):
    life = Life(one_by_one(prompt, max_tokens=tokens), "a prompt of more than 4 tokens takes steps")
    assert life.step() == [], "there is no request, so there is nothing to return"
    life.add(0)
    for step in range(-(-len(prompt) // 4) - 1):
        assert life.step() == [], f"step {step} computes a part of the prompt and draws nothing"
    for number in range(1, tokens + 1):
        outputs = life.step()
        assert [o.request_id for o in outputs] == ["0"], "the request got a token in this step"
        length = len(outputs[0].outputs[0].token_ids)
        assert length == number, f"one token each step: {number} by now, not {length}"
        assert outputs[0].finished == (number == tokens), f"it ends with token {tokens}"
    life.check()
    assert life.step() == [], "the request has ended"


@pytest.mark.task("15.5")
@at_most(25)
@given(
    prompts=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=9), min_size=2, max_size=3),
    steps=st.integers(0, 6),
    width=st.integers(1, 2),
)
def test_an_abort_leaves_nothing_behind(prompts, steps, width):
    params = {"max_tokens": 9, "ignore_eos": True, "n": width}
    requests = tuple(Request(tuple(prompt), params) for prompt in prompts)
    life = Life(Workload(requests, 2, 20, 8, 8))
    for number in range(len(prompts)):
        life.add(number)
    for _ in range(steps):
        life.step()
    for number, prompt in enumerate(prompts):
        before = life.outputs.get(str(number))
        output = life.abort(str(number))
        assert output is not None, f"request {number} has not ended yet, so it is aborted"
        assert output.finished, "an aborted request is finished"
        assert output.prompt_token_ids == prompt
        reasons = {completion.finish_reason for completion in output.outputs}
        assert reasons == {"abort"}, f"its outputs ended with {reasons}"
        if before is not None:
            tokens = [completion.token_ids for completion in output.outputs]
            assert tokens == [c.token_ids for c in before.outputs], "it keeps what it has got"
        held = [t for t in life.engine.scheduler.manager.tables if t not in all_alive(life.engine)]
        assert not held, f"sequences {held} have ended and still hold blocks"
        assert life.abort(str(number)) is None, "there is no such request any more: None, no error"
    assert not life.engine.has_unfinished_requests
    used = life.engine.scheduler.manager.device.num_used
    assert used == 0, f"everything is aborted, and {used} blocks are still in use"
    assert life.step() == []


def all_alive(engine):
    queued = [*engine.scheduler.running, *engine.scheduler.waiting]
    return {sequence.seq_id for group in queued for sequence in group.sequences}


@pytest.mark.task("15.5")
def test_a_request_that_ended_cannot_be_aborted():
    life = Life(one_by_one([1, 2], max_tokens=1))
    life.add(0)
    life.step()
    assert life.abort("0") is None, "it ended before the abort came: None, no error"
    life.add(0)  # its id is free again
    life.step()


@pytest.mark.task("15.5")
def test_an_observer_sees_the_blocks_of_those_who_end():
    life = Life(one_by_one([1, 2, 3], max_tokens=3), "with an observer that keeps every record")
    trace = Trace()
    life.engine.observers.append(trace)
    life.add(0)
    for _ in range(3):
        life.step()
    assert [record.step for record in trace] == [0, 1, 2], "observers are told of every step"
    for record in trace:
        assert list(record.new_text) == [0], (
            f"sequence 0 got a token in step {record.step}, so new_text has its text, even if that "
            f"is empty; it has {record.new_text}"
        )
    assert life.engine.num_steps == 3, "num_steps counts the steps that had something to do"
    last = trace.records[-1]
    assert last.finished == {"0": "length"}, "the last record says who ended, and why"
    tokens = [table.num_tokens for table in last.tables]
    assert tokens == [5], (
        "observers are called before the blocks of those who ended are let go of, so that they "
        f"can be seen: one table of 5 tokens, not {tokens}"
    )


@pytest.mark.task("15.5")
def test_a_fork_is_told_in_its_own_step_only():
    life = Life(one_by_one([1, 2, 3], max_tokens=3, n=2, temperature=1.0), "two samples fork once")
    trace = Trace()
    life.engine.observers.append(trace)
    life.add(0)
    for _ in range(3):
        life.step()
    forks = [len(record.forks) for record in trace]
    assert forks == [1, 0, 0], (
        f"the samples fork when the prompt is computed and never again; told were {forks} forks: "
        "what happened in a step is forgotten after it"
    )


@pytest.mark.task("15.5")
def test_what_was_computed_is_known_to_the_prefix_cache():
    prompt = (1, 2, 3, 4, 5, 6)
    requests = tuple(Request(prompt, {"max_tokens": 2, "ignore_eos": True}) for _ in range(2))
    life = Life(Workload(requests, 2, 12, 8, 8, prefix_caching=True), "twice the same prompt")
    for number in range(2):
        life.add(number)
        while life.engine.has_unfinished_requests:
            life.step()
    found = life.engine.scheduler.manager.prefix_cache.num_hit_tokens
    assert found == 4, (
        f"the second prompt finds its first two blocks, 4 tokens, and found {found}: "
        "manager.mark_computed tells what lies in the blocks after every step"
    )
    life.check()


@pytest.mark.task("15.5")
def test_what_was_computed_is_known_to_its_own_salt_only():
    life = Life(Workload((), 2, 12, 8, 8, prefix_caching=True), "one prompt with two salts")
    for request_id, salt, found in (("0", b"a", 0), ("1", b"b", 0), ("2", b"a", 4)):
        params = SamplingParams(max_tokens=1, ignore_eos=True)
        life.engine.add_request(request_id, [1, 2, 3, 4, 5, 6], params, cache_salt=salt)
        story.tell(f'engine.add_request("{request_id}", ..., cache_salt={salt})')
        (output,) = life.step()
        assert output.num_cached_tokens == found, (
            f"{found} tokens of the prompt are known to who has the salt {salt}, and the output "
            f"says {output.num_cached_tokens}: manager.mark_computed takes the sequence's "
            "cache_salt, and state.num_cached_tokens is what was computed before the first step"
        )


@pytest.mark.task("15.5")
def test_an_end_token_ends_the_output():
    requests = tuple(Request((token,), {"max_tokens": 12, "seed": token}) for token in range(12))
    life = Life(Workload(requests, 2, 90, 12, 12), f"tokens {EOS} end an output")
    for number in range(12):
        life.add(number)
    while life.engine.has_unfinished_requests:
        life.step()
    life.check()
    reasons = {o.outputs[0].finish_reason for o in life.outputs.values()}
    assert reasons == {"stop", "length"}, f"some stop and some reach 12 tokens; got {reasons}"


@pytest.mark.task("15.5")
@at_most(20)
@given(workload=workloads())
def test_tokens_do_not_depend_on_the_schedule(workload):
    life = Life(workload)
    life.run()
    life.check()
