"""Lesson 1: attention, the cache that saves it work, and generation of one request alone."""

import math

import numpy as np
import pytest
import torch
from effort import at_most
from hypothesis import given
from hypothesis import strategies as st
from strategies import CONTEXT, EOS, VOCAB, tiny_decoder

from minipaged.attention.contiguous import contiguous_attention
from minipaged.course.narration import story
from minipaged.decoding.sampler import Draw, sample
from minipaged.engine.naive import ContiguousCache, _compute, generate_alone
from minipaged.request.sampling_params import SamplingParams
from minipaged.request.sequence import Sequence

pytestmark = pytest.mark.usefixtures("one_thread")


def written_out(query, key, value):
    """Equation 2 of the paper as a sum: token by token and head by head, in numpy's float64."""
    query, key, value = (np.asarray(part, dtype=np.float64) for part in (query, key, value))
    (queries, heads, head_dim), (context, kv_heads, _) = query.shape, key.shape
    output = np.empty_like(query)
    for i in range(queries):
        seen = context - queries + i + 1
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            scores = key[:seen, kv_head] @ query[i, head] / math.sqrt(head_dim)
            weights = np.exp(scores - scores.max())
            output[i, head] = weights @ value[:seen, kv_head] / weights.sum()
    return output


def compare(actual, expected, context, kv_heads, tolerance=1e-9):
    """Assert that an attention is right; what is said of it names a token and a head."""
    shape = tuple(actual.shape)
    assert shape == expected.shape, f"the shape is {shape}; it must be that of the query"
    queries, heads, _ = shape
    for i, head in np.ndindex(queries, heads):
        position, kv_head = context - queries + i, head // (heads // kv_heads)
        where = (
            f"query {i}, of token {position} in a context of {context}, head {head}: it sees the "
            f"keys 0..{position} of KV head {kv_head}"
        )
        mine, right = actual[i, head].double().numpy(), expected[i, head]
        if not np.isfinite(mine).all():
            raise AssertionError(f"{where}, and the result is {mine}")
        if not np.allclose(mine, right, rtol=tolerance, atol=tolerance):
            raise AssertionError(f"{where}; that gives {right.round(3)}, not {mine.round(3)}")


def attend(queries, context, kv_heads=1, group=1, head_dim=2, dtype=torch.float64, factor=1):
    """Call contiguous_attention on random numbers, telling how; returns what went in and out."""
    heads = kv_heads * group
    story.begin()
    torch.manual_seed(0)
    story.tell("torch.manual_seed(0)")
    query = factor * torch.randn(queries, heads, head_dim, dtype=dtype)
    code = f"torch.randn({queries}, {heads}, {head_dim}, dtype={dtype})"
    positions = f"{context - queries}..{context - 1}" if queries > 1 else f"{context - 1} alone"
    story.tell(f"query = {factor} * {code}" if factor != 1 else f"query = {code}")
    story.tell(f"# tokens: {positions}   heads: {heads}   numbers in a head: {head_dim}")
    key, value = torch.randn(2, context, kv_heads, head_dim, dtype=dtype)
    story.tell(f"key, value = torch.randn(2, {context}, {kv_heads}, {head_dim}, dtype={dtype})")
    before = [part.clone() for part in (query, key, value)]
    story.start_call("contiguous_attention(query, key, value)")
    output = contiguous_attention(query, key, value)
    story.end_call("", "")
    for name, part, old in zip(("query", "key", "value"), (query, key, value), before, strict=True):
        assert torch.equal(part, old), f"{name} was changed; the cache needs it as it was"
    assert output.dtype == dtype, f"numbers of {dtype} went in, and {output.dtype} came out"
    return query, key, value, output


heads = st.integers(1, 3)
head_dims = st.integers(1, 5)
contexts = st.integers(1, 9)


@st.composite
def queries_and_contexts(draw):
    """How many tokens are new, and how many there are with them."""
    context = draw(contexts)
    return draw(st.integers(1, context)), context


@pytest.mark.task("1.1")
@given(context=contexts, kv_heads=heads, head_dim=head_dims)
def test_one_new_token_sees_its_whole_context(context, kv_heads, head_dim):
    query, key, value, output = attend(1, context, kv_heads, head_dim=head_dim)
    compare(output, written_out(query, key, value), context, kv_heads)


@pytest.mark.task("1.1")
@given(lengths=queries_and_contexts(), kv_heads=heads, head_dim=head_dims)
def test_no_token_sees_a_later_one(lengths, kv_heads, head_dim):
    query, key, value, output = attend(*lengths, kv_heads, head_dim=head_dim)
    compare(output, written_out(query, key, value), lengths[1], kv_heads)


@pytest.mark.task("1.1")
@given(lengths=queries_and_contexts(), kv_heads=heads, group=heads, head_dim=head_dims)
def test_neighbouring_heads_share_a_kv_head(lengths, kv_heads, group, head_dim):
    query, key, value, output = attend(*lengths, kv_heads, group, head_dim)
    compare(output, written_out(query, key, value), lengths[1], kv_heads)


@pytest.mark.task("1.1")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@given(context=contexts, kv_heads=heads, group=heads, head_dim=head_dims)
def test_a_whole_prompt_as_torch_computes_it(dtype, tolerance, context, kv_heads, group, head_dim):
    query, key, value, output = attend(context, context, kv_heads, group, head_dim, dtype)
    expected = whole_text(0, query, key, value).double().numpy()
    compare(output, expected, context, kv_heads, tolerance)


@pytest.mark.task("1.1")
def test_large_scores_do_not_overflow():
    query, key, value, output = attend(3, 5, factor=10_000)
    compare(output, written_out(query, key, value), 5, 1)


def whole_text(layer, query, key, value):
    """Attention of a whole text to itself by torch, without a cache: an `attend` for decoders."""
    query, key, value = (part.transpose(0, 1) for part in (query, key, value))
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(query, key, value, is_causal=True, enable_gqa=True).transpose(0, 1)


# Tasks 2 and 3: caches are fed with numbered tokens, whose queries, keys and values are these.

LAYERS, TOKENS, HEADS, KV_HEADS, HEAD_DIM = 2, 30, 4, 2, 3
rng = np.random.default_rng(0)
QUERIES = torch.from_numpy(rng.standard_normal((LAYERS, TOKENS, HEADS, HEAD_DIM)))
KEYS = torch.from_numpy(rng.standard_normal((LAYERS, TOKENS, KV_HEADS, HEAD_DIM)))
VALUES = torch.from_numpy(rng.standard_normal((LAYERS, TOKENS, KV_HEADS, HEAD_DIM)))


class Text:
    """A text, as the numbers of its tokens, and the cache that it is fed to layer by layer.

    texts: all that came of one beginning, this one included.
    """

    def __init__(self, name, cache, tokens=(), made_by="ContiguousCache()", texts=None):
        self.name, self.cache, self.tokens = name, cache, list(tokens)
        self.texts = [] if texts is None else texts
        self.texts.append(self)
        story.tell(f"{name} = {made_by}", self.state())

    def state(self):
        """How many tokens each layer has, in every text."""
        parts = []
        for text in self.texts:
            lengths = {layer: len(key) for layer, (key, _) in text.cache._layers.items()}
            parts.append(f"{text.name}: {lengths}")
        return f"tokens by layer, {'   '.join(parts)}"

    def copy(self, name):
        """A second text that begins like this one."""
        story.start_call(f"{name} = {self.name}.copy()")
        copied = self.cache.copy()
        return Text(name, copied, self.tokens, f"{self.name}.copy()", self.texts)

    def grow(self, new):
        """Feed the next tokens, and compare the attention with the one of the whole text."""
        self.tokens += new
        for layer in range(LAYERS):
            story.start_call(f"{self.name}.attend({layer}, q, k, v)")
            output = self.cache.attend(
                layer, QUERIES[layer, new], KEYS[layer, new], VALUES[layer, new]
            )
            story.end_call(f"  of tokens {new}", self.state())
            keys, values = KEYS[layer, self.tokens], VALUES[layer, self.tokens]
            expected = written_out(QUERIES[layer, new], keys, values)
            try:
                compare(output, expected, len(self.tokens), KV_HEADS)
            except AssertionError as error:
                raise AssertionError(
                    f"{self.name} has the tokens {self.tokens}, of which {new} are new.  Their "
                    f"attention in layer {layer} is wrong:\n{error}"
                ) from None


@pytest.mark.task("1.2")
@given(pieces=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_pieces_of_a_text_see_what_the_whole_text_sees(pieces):
    story.begin()
    text = Text("cache", ContiguousCache())
    for piece in pieces:
        first = len(text.tokens)
        text.grow(list(range(first, first + piece)))


@pytest.mark.task("1.2")
def test_what_is_kept_is_the_keys_and_values_and_no_more():
    story.begin()
    text = Text("cache", ContiguousCache())
    for new in ([0, 1, 2], [3], [4]):
        text.grow(new)
    for layer in range(LAYERS):
        key, value = text.cache._layers[layer]
        for what, kept, all_ in (("keys", key, KEYS), ("values", value, VALUES)):
            wanted = all_[layer, text.tokens]
            assert kept.shape == wanted.shape, (
                f"layer {layer} keeps {what} of shape {tuple(kept.shape)}; 5 tokens with "
                f"{KV_HEADS} KV heads of {HEAD_DIM} numbers are {tuple(wanted.shape)}"
            )
            assert torch.equal(kept, wanted), f"the {what} of layer {layer} are not those given"


@pytest.mark.task("1.3")
@at_most(60)
@given(
    prompt=st.integers(0, 3),
    choices=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), max_size=8),
)
def test_texts_that_began_alike_go_their_own_ways(prompt, choices):
    story.begin()
    texts = [Text("a", ContiguousCache())]
    tokens = iter(range(TOKENS))
    if prompt:
        texts[0].grow([next(tokens) for _ in range(prompt)])
    texts.append(texts[0].copy("b"))
    for which, length in choices:
        text = texts[which % len(texts)]
        if length:
            text.grow([next(tokens) for _ in range(length)])
        elif len(texts) < 4:
            texts.append(text.copy("abcd"[len(texts)]))
    for text in texts:
        text.grow([next(tokens)])


# Tasks 4 and 5: a model with random weights, in float64.


class Watched:
    """A decoder that remembers which tokens went through it, and at which positions."""

    def __init__(self, decoder):
        self.decoder, self.config = decoder, decoder.config
        self.token_ids, self.positions = [], []

    def __call__(self, token_ids, positions, attend, logits_at=None):
        self.token_ids += token_ids.tolist()
        self.positions += positions.tolist()
        return self.decoder(token_ids, positions, attend, logits_at)


def logits_of(decoder, token_ids):
    """Behind the last token, with everything computed anew, without a cache."""
    positions = torch.arange(len(token_ids))
    return decoder(torch.tensor(token_ids), positions, whole_text)[-1:]


token_ids = st.integers(0, VOCAB - 1)
prompts = st.lists(token_ids, min_size=1, max_size=6)


@pytest.mark.task("1.4")
@at_most(50)
@given(pieces=st.lists(st.lists(token_ids, min_size=1, max_size=4), min_size=1, max_size=4))
def test_only_new_tokens_are_computed(pieces):
    story.begin()
    decoder, cache = Watched(tiny_decoder()), ContiguousCache()
    sequence = Sequence(0, pieces[0])
    story.tell(f"sequence = Sequence(0, {pieces[0]})", repr(sequence))
    for piece in pieces:
        if piece is not pieces[0]:
            sequence.token_ids += piece
            story.tell(f"sequence.token_ids += {piece}", repr(sequence))
        first = sequence.num_computed_tokens
        decoder.token_ids, decoder.positions = [], []
        story.start_call("_compute(decoder, cache, sequence)")
        logits = _compute(decoder, cache, sequence)
        story.end_call("", repr(sequence))
        total = len(sequence.token_ids)
        assert decoder.token_ids == piece, (
            f"the tokens {decoder.token_ids} went through the decoder; new are {piece}"
        )
        assert decoder.positions == list(range(first, total)), (
            f"the new tokens stand at {list(range(first, total))} of the text, and were computed "
            f"at {decoder.positions}"
        )
        if sequence.num_computed_tokens != total:
            raise AssertionError(
                f"all {total} tokens are in the cache now, and num_computed_tokens says "
                f"{sequence.num_computed_tokens}"
            )
        assert tuple(logits.shape) == (1, VOCAB), (
            f"the logits behind the last token are a matrix of 1 row and {VOCAB} columns, "
            f"not of shape {tuple(logits.shape)}"
        )
        expected = logits_of(decoder.decoder, sequence.token_ids)
        assert torch.allclose(logits, expected, rtol=1e-8, atol=1e-8), (
            "the logits differ from those of the whole text computed at once: is it the last row?"
        )


def generate_anew(decoder, prompt, params, random_key, eos):
    """The same with the whole text computed for every token: slow, and without a cache."""
    sequence = Sequence(0, prompt, random_key)
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos))
    room = CONTEXT - len(prompt)
    output = []
    while len(output) < min(params.max_tokens or room, room) and ends.isdisjoint(output):
        (token,) = sample(
            logits_of(decoder, sequence.token_ids), [Draw(sequence, params, tuple(ends))]
        )
        output.append(token.token_id)
        sequence.token_ids.append(token.token_id)
    return output


def check_generation(prompt, model_seed=0, random_key=(0,), **params):
    """Generate, and compare with the slow way."""
    decoder = Watched(tiny_decoder(model_seed))
    described = ", ".join(f"{name}={value!r}" for name, value in params.items())
    story.begin()
    story.tell(f"decoder = tiny_decoder({model_seed})", f"it ends with token {EOS[0]}")
    story.tell(f"params = SamplingParams({described})")
    story.start_call(f"generate_alone(decoder, {prompt}, params, {random_key}, {EOS})")
    chosen = SamplingParams(**params)
    output = generate_alone(decoder, prompt, chosen, random_key, EOS)
    story.end_call(f"  -> {output}", "")
    expected = generate_anew(decoder.decoder, prompt, chosen, random_key, EOS)
    if output != expected:
        raise AssertionError(
            f"the output is {output}; the whole text computed anew for every token gives {expected}"
        )
    computed = len(prompt) + len(output) - 1
    assert len(decoder.token_ids) == computed, (
        f"{len(decoder.token_ids)} tokens went through the decoder; {len(prompt)} of the prompt "
        f"and {len(output)} of the output, the last of which nobody needs, are {computed}"
    )


@pytest.mark.task("1.5")
@at_most(30)
@given(prompt=prompts, model_seed=st.integers(0, 3), max_tokens=st.integers(1, 8))
def test_the_likeliest_tokens(prompt, model_seed, max_tokens):
    check_generation(prompt, model_seed, temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


@pytest.mark.task("1.5")
@at_most(30)
@given(prompt=prompts, seed=st.integers(0, 9), max_tokens=st.integers(1, 8))
def test_tokens_drawn_from_the_stream_of_the_request(prompt, seed, max_tokens):
    check_generation(prompt, 0, (seed, 0), temperature=1.5, max_tokens=max_tokens, ignore_eos=True)


@pytest.mark.task("1.5")
@at_most(30)
@given(prompt=prompts, seed=st.integers(0, 9), stop=st.lists(token_ids, max_size=1))
def test_an_end_token_ends_the_output(prompt, seed, stop):
    check_generation(prompt, 0, (seed, 0), temperature=1.5, max_tokens=12, stop_token_ids=stop)


@pytest.mark.task("1.5")
def test_the_context_of_the_model_is_the_end():
    prompt = [1, 2, 4, 5] * (CONTEXT // 4 - 1)
    check_generation(prompt, temperature=0.0, max_tokens=None, ignore_eos=True)
