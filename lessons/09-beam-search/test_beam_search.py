"""Lesson 9: the search on numbers alone, then beams that fork and are freed (T4, T5)."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from effort import at_most
from hypothesis import assume, example, given
from hypothesis import strategies as st
from strategies import Request, Workload

from minipaged.course.narration import story
from minipaged.course.notation import name
from minipaged.decoding.beam_search import BeamSearch, Candidate
from minipaged.engine.naive import beam_search_alone
from minipaged.engine.trace import Trace
from minipaged.request.sampling_params import SamplingParams

penalties = st.sampled_from([1.0, 0.0, 0.5, 2.0, -1.0])
stopping = st.sampled_from([False, True, "never"])


def new_search(width, ends=(), max_tokens=9, **options):
    """A search whose story is told from here on; options are those of SamplingParams."""
    story.begin()
    told = "".join(f", {option}={value!r}" for option, value in options.items())
    story.tell(f"params = SamplingParams(n={width}, use_beam_search=True, temperature=0{told})")
    story.tell(f"search = BeamSearch(params, {ends}, max_tokens={max_tokens})")
    options |= {"n": width, "use_beam_search": True, "temperature": 0, "max_tokens": max_tokens}
    params = SamplingParams(**options)
    return BeamSearch(params, ends, max_tokens)


def put(search, **state):
    """Set attributes of a search to what they are in the middle of it."""
    for attribute, value in state.items():
        setattr(search, attribute, value)
        story.tell(f"search.{attribute} = {value!r}")


def shown(candidates):
    return [(c.beam, c.token_id, round(c.cumulative_logprob, 2)) for c in candidates]


# Log-probabilities of outputs, with two digits: short to read, and far enough apart.
negative = st.integers(-900, -10).map(lambda n: n / 100)


# 9.1


@pytest.mark.task("9.1")
@given(
    before=st.lists(negative, min_size=1, max_size=3, unique=True),
    width=st.integers(1, 3),
    ends=st.sampled_from([(), (5,), (1, 4), (0, 2, 5)]),
    min_tokens=st.sampled_from([0, 0, 1, 2]),
    length=st.integers(1, 3),
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_all_continuations_of_all_beams_compete(
    before, width, ends, min_tokens, length, dtype, seed
):
    search = new_search(width, ends, min_tokens=min_tokens)
    before = sorted(before, reverse=True)
    put(search, length=length, cumulative_logprobs=before)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(before), 6, generator=generator).mul(2).to(dtype)
    rows = [[round(x, 2) for x in row] for row in logits.tolist()]
    story.tell(f"logits = torch.tensor({rows}, dtype={dtype})")
    story.tell("found = search._likeliest(logits)")

    every = []
    for beam, row in enumerate(logits.tolist()):
        total = math.log(sum(math.exp(x) for x in row))
        for token_id, x in enumerate(row):
            if length > min_tokens or token_id not in ends:
                every.append(Candidate(beam, token_id, x - total, before[beam] + x - total))
    every.sort(key=lambda c: -c.cumulative_logprob)
    sums = [c.cumulative_logprob for c in every]
    assume(all(a - b > 1e-4 for a, b in itertools.pairwise(sums)))

    given_logits = logits.clone()
    found = search._likeliest(logits)
    story.tell("found", f"{shown(found)}")
    assert torch.equal(logits, given_logits), "the logits belong to the engine; leave them alone"
    for candidate in found:
        assert candidate.cumulative_logprob > -math.inf, (
            f"token {candidate.token_id} ends an output, and an output of length {length} may not "
            f"end: min_tokens is {min_tokens}"
        )
    places = [(c.beam, c.token_id) for c in found]
    expected = [(c.beam, c.token_id) for c in every][: len(places)]
    assert places == expected, f"the best (beam, token) pairs in order are {expected}"
    for got, wanted in zip(found, every, strict=False):
        assert got.logprob == pytest.approx(wanted.logprob, abs=1e-5), (
            f"token {got.token_id} behind beam {got.beam} has log-probability {wanted.logprob}"
        )
        assert got.cumulative_logprob == pytest.approx(wanted.cumulative_logprob, abs=1e-5), (
            f"with it the output has {wanted.cumulative_logprob}"
        )
    going_on = sum(token_id not in ends for _, token_id in places)
    possible = sum(c.token_id not in ends for c in every)
    assert going_on >= min(width, possible), (
        f"{width} beams must be able to go on, and only {going_on} of {len(found)} candidates do"
    )
    assert search.logprobs.shape == logits.shape, (
        "search.logprobs keeps the log-probabilities of all tokens: the engine reports them"
    )
    finest = torch.float64 if dtype == torch.float64 else torch.float32
    assert search.logprobs.dtype == finest, (
        f"with logits in {dtype} the search computes in {finest}, not in {search.logprobs.dtype}"
    )


@pytest.mark.task("9.1")
@pytest.mark.parametrize("ends", [(), (0,), (0, 1), (0, 1, 2)])
def test_when_all_ends_are_likely_beams_can_still_go_on(ends):
    search = new_search(2, ends)
    put(search, length=3, cumulative_logprobs=[-1.0, -1.5])
    rows = [[9.0, 8.5, 8.25, 2.0, 1.0, 0.5], [9.0, 8.0, 7.5, 2.0, 1.0, 0.5]]
    story.tell(f"logits = torch.tensor({rows})")
    found = search._likeliest(torch.tensor(rows))
    story.tell("found = search._likeliest(logits)", f"{shown(found)}")
    going_on = [candidate for candidate in found if candidate.token_id not in ends]
    assert len(going_on) >= 2, (
        f"2 beams must be able to go on, and {len(going_on)} of {len(found)} candidates do"
    )


# 9.2


@pytest.mark.task("9.2")
@given(logprob=negative, length=st.integers(1, 9), penalty=penalties)
def test_a_score_is_a_log_probability_per_length(logprob, length, penalty):
    search = new_search(2, length_penalty=penalty)
    score = search.score(logprob, length)
    story.tell(f"search.score({logprob}, {length})", f"{score}")
    expected = logprob / math.pow(length, penalty)
    assert score == pytest.approx(expected), (
        f"{logprob} divided by {length} to the power of {penalty} is {expected}"
    )


@pytest.mark.task("9.2")
@given(
    width=st.integers(1, 3),
    steps=st.lists(st.lists(negative, max_size=3), max_size=6),
    penalty=penalties,
)
def test_the_best_hypotheses_are_kept(width, steps, penalty):
    search = new_search(width, length_penalty=penalty)
    every, scored = [], search.score(-1.0, 1)
    assert scored == -1.0, "one token of log-probability -1 scores -1, whatever the penalty"
    for length, logprobs in enumerate(steps, start=1):
        put(search, length=length)
        for logprob in logprobs:
            score = logprob / math.pow(length, penalty)
            assume(all(abs(score - other) > 1e-6 for other in every))
            every.append(score)
            best = sorted(every, reverse=True)[:width]
            kept = search._keep(Candidate(0, 0, -1.0, logprob))
            scores = [round(s, 4) for s in search.best_scores]
            story.tell(f"search._keep(Candidate(0, 0, -1.0, {logprob}))  -> {kept}", f"{scores}")
            assert search.best_scores == pytest.approx(best), (
                f"the {width} best of all {len(every)} scores are {[round(s, 4) for s in best]}"
            )
            assert kept == (score in best), (
                f"its score {score:.4f} is {'' if not kept else 'not '}among them"
            )


@pytest.mark.task("9.2")
def test_a_score_that_only_equals_the_worst_is_not_kept():
    search = new_search(2)
    put(search, length=2)
    for logprob, expected in ((-2.0, True), (-4.0, True), (-4.0, False), (-3.0, True)):
        kept = search._keep(Candidate(0, 0, -1.0, logprob))
        story.tell(f"search._keep(Candidate(0, 0, -1.0, {logprob}))  -> {kept}")
        assert kept == expected, (
            f"its score is {logprob / 2}, and the two that are kept are {search.best_scores}: only "
            "a better one pushes the worst of a full list out"
        )


# 9.3


@pytest.mark.task("9.3")
def test_a_beam_that_can_only_draw_level_is_not_worth_going_on():
    search = new_search(2, early_stopping=False)
    put(search, length=4, cumulative_logprobs=[-4.0, -6.0], best_scores=[-0.5, -1.0])
    over = search._is_over()
    story.tell(f"search._is_over()  -> {over}")
    assert over, (
        "the best running beam scores -4 / 4 = -1, as much as the worst that is kept, which only a "
        "better one pushes out: so nothing can change any more"
    )


@pytest.mark.task("9.3")
@given(
    width=st.integers(1, 3),
    running=st.lists(negative, max_size=3),
    complete=st.lists(negative, max_size=3),
    length=st.integers(1, 9),
    early_stopping=stopping,
)
@example(width=2, running=[-5.0], complete=[-0.1], length=4, early_stopping=False)
def test_a_search_goes_on_until_it_has_enough(width, running, complete, length, early_stopping):
    search = new_search(width, early_stopping=early_stopping)
    running, best = sorted(running, reverse=True), sorted(complete, reverse=True)[:width]
    put(search, length=length, cumulative_logprobs=running, best_scores=best)
    over = search._is_over()
    story.tell(f"search._is_over()  -> {over}")
    if not running:
        assert over, "nothing runs any more"
    elif length == 9:
        assert over, "the outputs have max_tokens tokens"
    elif len(best) < width:
        assert not over, f"only {len(best)} of {width} hypotheses are complete"
    elif early_stopping is True:
        assert over, f"{width} hypotheses are complete, and early_stopping is True"


@pytest.mark.task("9.3")
@given(
    worst=negative,
    running=st.lists(negative, min_size=1, max_size=2),
    length=st.integers(1, 8),
    early_stopping=st.sampled_from([False, "never", "never"]),
    penalty=st.sampled_from([1.0, 0.0, 0.5, 2.0, -0.5, -1.0]),
)
@example(worst=-5.0, running=[-1.0], length=2, early_stopping="never", penalty=-1.0)
def test_it_ends_when_nothing_can_get_better(worst, running, length, early_stopping, penalty):
    search = new_search(2, early_stopping=early_stopping, length_penalty=penalty)
    running = sorted(running, reverse=True)
    put(search, length=length, cumulative_logprobs=running, best_scores=[-0.05, worst])
    lengths = range(length, 10) if early_stopping == "never" else [length]
    scores = {n: running[0] / math.pow(n, penalty) for n in lengths}
    n = max(scores, key=scores.get)
    assume(abs(scores[n] - worst) > 1e-6)
    over = search._is_over()
    story.tell(f"search._is_over()  -> {over}")
    assert over == (scores[n] < worst), (
        f"the best running beam would score {scores[n]:.4f} with {n} of at most 9 tokens, and the "
        f"worst hypothesis that is kept scores {worst}"
    )


# 9.4


class TableModel:
    """A language model that is a table: logits depend on a token and its position alone.

    It has what `beam_search_alone` asks of a decoder.
    """

    vocab = 6
    config = SimpleNamespace(sliding_window=None, context_length=64)

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(16, self.vocab, self.vocab, generator=generator).double() * 2

    def __call__(self, tokens, positions, attend):
        return self.table[positions, tokens]


def letters(text):
    return "".join("abcdef"[token_id] for token_id in text)


def run_search(search, model):
    """All hypotheses that the search completes, as (tokens, score)."""
    texts, done = [[0]], []
    while texts:
        logits = torch.stack([model.table[len(text) - 1, text[-1]] for text in texts])
        story.start_call(f"search.step(logits behind {[letters(text) for text in texts]})")
        running, complete = search.step(logits)
        for candidate in complete:
            tokens = [*texts[candidate.beam][1:], candidate.token_id]
            score = candidate.cumulative_logprob / math.pow(
                len(tokens), search.params.length_penalty
            )
            done.append((tokens, score))
        ended = [letters([*texts[c.beam], c.token_id]) for c in complete]
        texts = [[*texts[candidate.beam], candidate.token_id] for candidate in running]
        story.end_call("", f"running {[letters(text) for text in texts]}, complete {ended}")
        if texts:
            found = [candidate.cumulative_logprob for candidate in running]
            assert search.cumulative_logprobs == found, (
                "search.cumulative_logprobs are those of the running beams, in order"
            )
            assert len(texts) <= search.params.width, f"{len(texts)} beams run"
        assert len(texts[0] if texts else []) <= search.max_tokens, "longer than max_tokens"
    return done


@pytest.mark.task("9.4")
@at_most(60)
@given(
    seed=st.integers(0, 1000),
    width=st.integers(1, 4),
    ends=st.sets(st.integers(1, 5), max_size=2).map(lambda ends: tuple(sorted(ends))),
    max_tokens=st.integers(1, 8),
    early_stopping=stopping,
    penalty=penalties,
    min_tokens=st.integers(0, 1),
)
def test_the_search_finds_what_the_naive_search_finds(
    seed, width, ends, max_tokens, early_stopping, penalty, min_tokens
):
    options = {
        "early_stopping": early_stopping,
        "length_penalty": penalty,
        "min_tokens": min_tokens,
    }
    search = new_search(width, ends, max_tokens, **options)
    story.tell(f"# The prompt is 'a'; tokens that end an output: {letters(ends)!r}")
    model = TableModel(seed)
    done = sorted(run_search(search, model), key=lambda hypothesis: -hypothesis[1])[:width]
    expected = beam_search_alone(model, [0], search.params, ends)
    got = [(letters(tokens), round(score, 4)) for tokens, score in done]
    wanted = [(letters(tokens), round(score, 4)) for tokens, score in expected]
    assert got == wanted, f"the best are {got}, and the naive search finds {wanted}"


@pytest.mark.task("9.4")
@pytest.mark.parametrize(
    ("probabilities", "is_complete"),
    [([0.4, 0.15, 0.1, 0.35], True), ([0.45, 0.3, 0.1, 0.15], False)],
    ids=["second best", "third best"],
)
def test_an_end_counts_only_among_the_best(probabilities, is_complete):
    search = new_search(2, (3,))
    running, complete = search.step(torch.tensor([probabilities]).log())
    story.tell(
        f"search.step(log of [{probabilities}])",
        f"running {shown(running)}, complete {shown(complete)}",
    )
    ended = [candidate.token_id for candidate in complete]
    if is_complete:
        assert ended == [3], "of the 2 best continuations one is the end: a hypothesis"
    else:
        assert ended == [], "2 continuations are better than the end, and the width is 2"
    going_on = [candidate.token_id for candidate in running]
    assert going_on == [0, 1], "the 2 best that do not end go on, whatever ended"


# 9.5


def tables_state(manager):
    """The tables, and how much of the pool is free."""
    tables = [
        f"table {name(seq_id)}: {table.blocks} {table.num_tokens} tokens"
        for seq_id, table in manager.tables.items()
    ]
    device = manager.device
    return "   ".join([*tables, f"{device.num_free} of {device.num_blocks} free"])


def serve(requests, block_size=4):
    """Serve these requests; every step and the block tables after it are in the story."""
    story.begin()
    workload = Workload(tuple(requests), block_size, 60, 12, 80)
    engine, trace = workload.engine(), Trace()
    engine.observers.append(trace)
    story.tell(f"engine = build_engine(..., EngineOptions(block_size={block_size}, ...))")
    for i, request in enumerate(requests):
        told = ", ".join(f"{option}={value}" for option, value in request.params.items())
        story.tell(f"engine.add_request('{i}', {list(request.prompt)}, SamplingParams({told}))")
        engine.add_request(str(i), request.prompt, SamplingParams(**request.params))
    widths = sum(SamplingParams(**request.params).width for request in requests)
    outputs, manager = {}, engine.scheduler.manager
    while engine.has_unfinished_requests:
        story.start_call("engine.step()")
        stepped = engine.step()
        story.end_call("", tables_state(manager))
        outputs |= {int(output.request_id): output for output in stepped}
        tables = len(manager.tables)
        assert tables <= widths, f"{tables} sequences hold blocks, and only {widths} beams can run"
        engine.check_integrity()
        assert len(trace) < 100, "the engine does not come to an end"
    left = manager.device.num_used
    assert left == 0, f"all requests have ended and {left} blocks are still held"
    return workload, trace, outputs


@st.composite
def beam_requests(draw):
    params = {
        "best_of": draw(st.integers(2, 4)),
        "max_tokens": draw(st.integers(1, 9)),
        "use_beam_search": True,
        "temperature": 0.0,
        "ignore_eos": draw(st.booleans()),
    }
    params["n"] = draw(st.integers(1, params["best_of"]))
    if draw(st.booleans()):
        params["stop_token_ids"] = tuple(draw(st.lists(st.integers(0, 12), max_size=2)))
    prompt = draw(st.lists(st.integers(0, 12), min_size=1, max_size=9))
    return Request(tuple(prompt), params)


@pytest.mark.task("9.5")
@at_most(25)
@given(requests=st.lists(beam_requests(), min_size=1, max_size=2), block_size=st.integers(1, 5))
def test_every_request_gets_what_it_would_get_alone(requests, block_size):
    workload, _, outputs = serve(requests, block_size)
    for i, request in enumerate(requests):
        expected = request.expected(workload.decoder, i)
        alone = [tokens for tokens, _ in expected]
        got = [output.token_ids for output in outputs[i].outputs]
        assert got == alone, f"request {i} gets {got}; searched for alone it is {alone}"
        scores = [output.score for output in outputs[i].outputs]
        assert scores == pytest.approx([score for _, score in expected], abs=1e-9), (
            f"request {i}: the scores are {scores}, and should be "
            f"{[score for _, score in expected]}"
        )


@pytest.mark.task("9.5")
@at_most(25)
@given(request_=beam_requests(), block_size=st.integers(1, 5))
def test_what_observers_are_told_is_what_happened(request_, block_size):
    """The beam tree is drawn from it: forks and ends lead from one step's beams to the next's."""
    _, trace, _ = serve([request_], block_size)
    alive = {0}  # the prompt's sequence, the first of this engine
    for record in trace.records[:-1]:
        parents = {parent for parent, _ in record.forks}
        assert parents <= alive | {child for _, child in record.forks}, (
            f"step {record.step}: only a beam can fork, and {sorted(map(name, parents))} did"
        )
        alive |= {child for _, child in record.forks}
        alive -= set(record.ended)
        tables = {table.seq_id for table in record.tables}
        assert tables == alive, (
            f"step {record.step}: by its forks and ends there are {sorted(map(name, alive))}, and "
            f"{sorted(map(name, tables))} hold blocks"
        )


@pytest.mark.task("9.5")
@pytest.mark.parametrize("width", [2, 3, 4])
def test_the_prompt_is_stored_once(width):
    params = {"n": width, "max_tokens": 6, "use_beam_search": True, "temperature": 0.0}
    _, trace, _ = serve([Request(tuple(range(1, 10)), {**params, "ignore_eos": True})])
    for record in trace.records[:-1]:
        whole = {table.blocks[:2] for table in record.tables}
        assert len(whole) == 1, f"the beams hold {whole} for the full blocks of the prompt"
    first = trace.records[0].num_used_blocks
    assert first == 3, "the beams of the first step share the 3 blocks of the prompt"
