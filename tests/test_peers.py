"""Every family against transformers: the same checkpoint, the same logits, the same tokens."""

import functools
import json
import random
from unittest import mock

import gguf
import pytest
import torch
from checkpoints import VARIANTS, beams, greedy, write_checkpoint

from minipaged.attention.contiguous import contiguous_attention
from minipaged.engine.builder import EngineOptions, build_engine
from minipaged.engine.llm import LLM
from minipaged.engine.naive import ContiguousCache
from minipaged.errors import ModelLoadError
from minipaged.models import gguf_file
from minipaged.models.loader import load_decoder, resolve
from minipaged.request.sampling_params import SamplingParams

pytestmark = pytest.mark.peer


def prompts_of(lengths, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(3, 97) for _ in range(n)] for n in lengths]


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def pair(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    theirs = write_checkpoint(request.param, directory)
    decoder, tokenizer = load_decoder(directory, torch.float32)
    assert tokenizer is None
    return decoder, theirs


@torch.inference_mode()
def test_logits(pair):
    decoder, theirs = pair
    for prompt in prompts_of([1, 2, 17, 100]):
        tokens = torch.tensor(prompt)
        cache = ContiguousCache(decoder.config.sliding_window)
        ours = decoder(tokens, torch.arange(len(prompt)), cache.attend)
        torch.testing.assert_close(ours, theirs(tokens[None]).logits[0], rtol=0, atol=1e-4)


BEAMS = [
    {"best_of": 4, "n": 4},
    {"best_of": 3, "n": 2, "length_penalty": 0.0, "early_stopping": "never"},
    {"best_of": 2, "n": 1, "length_penalty": 2.0, "early_stopping": True},
    {"best_of": 5, "n": 5, "length_penalty": -0.5},
    {"best_of": 3, "n": 3, "length_penalty": 1.5, "early_stopping": "never", "min_tokens": 6},
]


def test_beam_search(pair):
    """Hypothesis for hypothesis and score for score, all searches in one batch of ours."""
    decoder, theirs = pair
    prompts = prompts_of([4, 21, 1, 9, 14], seed=2)
    # Tokens that come up, so that hypotheses of different lengths are complete.
    ends = tuple(sorted({*greedy(theirs)(prompts, 12)[0][7::2], 2}))
    options = EngineOptions(
        block_size=2,
        num_blocks=84 if decoder.config.sliding_window else 66,
        max_num_batched_tokens=30,
        max_num_seqs=20,
        preemption="swap",
    )
    engine = build_engine(decoder, None, options)
    engine.eos_token_ids = ends
    for i, (prompt, search) in enumerate(zip(prompts, BEAMS, strict=True)):
        params = SamplingParams(temperature=0, max_tokens=24, use_beam_search=True, **search)
        engine.add_request(str(i), prompt, params)
    done = {}
    while engine.has_unfinished_requests:
        done |= {o.request_id: o.outputs for o in engine.step() if o.finished}
        engine.check_integrity()
    lengths = set()
    for i, (prompt, search) in enumerate(zip(prompts, BEAMS, strict=True)):
        expected = beams(theirs)(prompt, search, ends, 24)
        assert [output.token_ids for output in done[str(i)]] == [tokens for tokens, _ in expected]
        scores = torch.tensor([output.score for output in done[str(i)]])
        torch.testing.assert_close(
            scores, torch.tensor([score for _, score in expected]), rtol=0, atol=1e-4
        )
        lengths |= {len(tokens) for tokens, _ in expected}
    assert len(lengths) > 1


def test_64_greedy_tokens_of_a_batch(pair):
    decoder, theirs = pair
    prompts = prompts_of([3, 30, 1, 12, 55], seed=1)
    # A pool so small that the batch preempts, and a budget that cuts the prompts in chunks.
    options = EngineOptions(block_size=4, num_blocks=60, max_num_batched_tokens=16, max_num_seqs=4)
    engine = build_engine(decoder, None, options)
    params = SamplingParams(temperature=0, max_tokens=64, min_tokens=64)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, params)
    done = {}
    while engine.has_unfinished_requests:
        done |= {o.request_id: o.outputs[0].token_ids for o in engine.step() if o.finished}
    if decoder.config.sliding_window is None:
        assert engine.scheduler.num_preemptions > 0
    assert [done[str(i)] for i in range(5)] == greedy(theirs)(prompts, 64)


@pytest.mark.parametrize("variant", ["llama3.1", "gpt2", "opt"])
def test_shards_and_bfloat16(variant, tmp_path):
    theirs = write_checkpoint(variant, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    decoder, _ = load_decoder(tmp_path, torch.float32)
    tokens = torch.tensor(prompts_of([20])[0])
    with torch.inference_mode():
        expected = theirs(tokens[None]).logits[0]
        ours = decoder(tokens, torch.arange(20), ContiguousCache().attend)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
        half, _ = load_decoder(tmp_path, torch.bfloat16)
        ours = half(tokens, torch.arange(20), ContiguousCache().attend)
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), expected, rtol=0.1, atol=0.15)


@pytest.mark.parametrize(
    ("rope", "old"),
    [
        ({"rope_type": "linear", "factor": 3.0}, "llama-linear"),
        ({"type": "linear", "factor": 3.0}, "llama-linear"),
    ],
)
def test_the_older_way_to_write_rope_scaling(rope, old, tmp_path):
    theirs = write_checkpoint(old, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"rope_scaling": rope, "rope_theta": 10000.0})
    )
    decoder, _ = load_decoder(tmp_path, torch.float32)
    tokens = torch.tensor(prompts_of([50])[0])
    with torch.inference_mode():
        ours = decoder(tokens, torch.arange(50), ContiguousCache().attend)
        torch.testing.assert_close(ours, theirs(tokens[None]).logits[0], rtol=0, atol=1e-4)


def test_the_shipped_model_in_transformers():
    transformers = pytest.importorskip("transformers")
    path = resolve("tiny")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    decoder, tokenizer = load_decoder("tiny", torch.float32)
    tokens = torch.tensor(tokenizer.encode("ROMEO:\nWhat light through yonder window breaks?"))
    with torch.inference_mode():
        ours = decoder(tokens, torch.arange(len(tokens)), ContiguousCache().attend)
        torch.testing.assert_close(ours, theirs(tokens[None]).logits[0], rtol=0, atol=1e-3)
    assert transformers.AutoTokenizer.from_pretrained(path)("ROMEO:")["input_ids"] == (
        tokenizer.encode("ROMEO:")
    )


CHATS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three fruits.",
    "Explain what a cache is, to a child.",
    "Translate 'good morning' to French.",
]


@pytest.fixture(scope="module")
def smollm2():
    transformers = pytest.importorskip("transformers")
    try:
        path = resolve("smollm2")
    except ModelLoadError as error:
        pytest.skip(str(error))
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    quantized = {}
    if hasattr(transformers, "GgufConfig"):
        quantized = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    # It reads the whole file three times and makes the map of its names once for every tensor.
    names_once = functools.cache(gguf.get_tensor_name_map)
    with mock.patch.multiple("gguf", GGUFReader=gguf_file.Reader, get_tensor_name_map=names_once):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, **quantized
        )
        return model.eval(), transformers.AutoTokenizer.from_pretrained(**where)


@pytest.mark.slow
def test_smollm2_answers_five_chats_alike(smollm2):
    model, tokenizer = smollm2
    llm = LLM("smollm2", dtype="float32", num_blocks=64, block_size=16)
    chats = [[{"role": "user", "content": text}] for text in CHATS]
    outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=40, min_tokens=40))
    prompts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        for chat in chats
    ]
    assert [output.prompt_token_ids for output in outputs] == prompts
    expected = greedy(model)(prompts, 40)
    assert [output.outputs[0].token_ids for output in outputs] == expected


@pytest.mark.slow
def test_smollm2_cuts_text_alike(smollm2):
    _, theirs = smollm2
    ours = gguf_file.GGUFFile(resolve("smollm2")).tokenizer()
    for text in (
        "Hello, world!",
        "  two  spaces\n\n\tand a tab ",
        "In 2023 there were 12345 of them.",
        "naïve café — “quotes” … 日本語 🙂👩‍👩‍👧 Ωμέγα",
        "<|im_start|>user\nhi<|im_end|>",
        "def f(x):\n    return x**2  # don't",
    ):
        assert ours.encode(text) == theirs(text)["input_ids"], text
        assert ours.decode(ours.encode(text), skip_special_tokens=False) == text


def test_attention_of_transformers_is_the_oracle():
    """The oracle against scaled_dot_product_attention, which transformers uses."""
    q, k, v = torch.randn(3, 9, 4, 8, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True
    ).transpose(0, 1)
    torch.testing.assert_close(contiguous_attention(q, k, v), expected)
