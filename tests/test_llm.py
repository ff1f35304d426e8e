"""The offline API with the shipped model: text in, text out, in order."""

import logging
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from minipaged import LLM, SamplingParams
from minipaged.attention.gathered import GatheredAttention
from minipaged.engine.builder import EngineOptions, build_engine
from minipaged.errors import ConfigurationError, InvalidRequestError
from minipaged.models.loader import load_decoder


@pytest.fixture(scope="module")
def llm():
    # In float32: in bfloat16 the company of others changes the rounding.
    return LLM(num_blocks=48, block_size=8, max_num_seqs=5, seed=1, debug=True, dtype="float32")


PROMPTS = ["ROMEO:", "First Citizen:\nBefore we", "To be, or", "JULIET:\nO Romeo", "KING", "My"]


def test_outputs_come_in_the_order_of_the_prompts(llm):
    params = [SamplingParams(temperature=0, max_tokens=5 + 7 * (i % 3)) for i in range(6)]
    outputs = llm.generate(PROMPTS, params)
    assert [output.prompt for output in outputs] == PROMPTS
    for output, prompt, p in zip(outputs, PROMPTS, params, strict=True):
        (completion,) = output.outputs
        assert output.finished
        assert len(completion.token_ids) <= p.max_tokens
        assert completion.text == llm.engine.tokenizer.decode(completion.token_ids)
        assert output.prompt_token_ids == llm.engine.tokenizer.encode(prompt)
        (alone,) = llm.generate(prompt, p)
        assert alone.outputs[0].text == completion.text


def test_prompts_may_be_token_ids(llm):
    params = SamplingParams(temperature=0, max_tokens=6)
    token_ids = llm.engine.tokenizer.encode("ROMEO:")
    as_text = llm.generate("ROMEO:", params)[0].outputs[0].token_ids
    assert llm.generate(token_ids, params)[0].outputs[0].token_ids == as_text
    assert llm.generate([token_ids], params)[0].prompt is None
    assert llm.generate([], params) == []


def test_stop_strings_cut_the_text(llm):
    params = {"temperature": 0, "max_tokens": 60, "ignore_eos": True}
    whole = llm.generate("ROMEO:", SamplingParams(**params))[0].outputs[0].text
    stop = whole[20:24]
    cut = whole.index(stop)
    shown = []

    def look(outputs):
        shown.extend(output.outputs[0].text for output in outputs)

    (output,) = llm.generate("ROMEO:", SamplingParams(**params, stop=stop), on_step=look)
    assert output.outputs[0].text == whole[:cut]
    assert output.outputs[0].finish_reason == "stop"
    assert all(whole[:cut].startswith(text) for text in shown), "text was shown and taken back"
    params |= {"stop": [stop], "include_stop_str_in_output": True}
    assert (
        llm.generate("ROMEO:", SamplingParams(**params))[0].outputs[0].text
        == (whole[: cut + len(stop)])
    )


def test_stop_tokens_are_in_the_tokens_and_not_in_the_text(llm):
    params = {"temperature": 0, "max_tokens": 30}
    tokens = llm.generate("ROMEO:", SamplingParams(**params))[0].outputs[0].token_ids
    stop = tokens[9]
    (output,) = llm.generate("ROMEO:", SamplingParams(**params, stop_token_ids=[stop]))
    (completion,) = output.outputs
    assert completion.token_ids == tokens[: tokens.index(stop) + 1]
    assert completion.finish_reason == "stop"
    assert completion.text == llm.engine.tokenizer.decode(completion.token_ids[:-1])


def test_logprobs(llm):
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=3)
    (completion,) = llm.generate("ROMEO:", params)[0].outputs
    assert len(completion.logprobs) == 5
    for token_id, logprobs in zip(completion.token_ids, completion.logprobs, strict=True):
        assert logprobs[token_id].rank == 1
        assert len(logprobs) == 3
    total = sum(
        lp[t].logprob for t, lp in zip(completion.token_ids, completion.logprobs, strict=True)
    )
    assert completion.cumulative_logprob == pytest.approx(total)
    assert llm.generate("ROMEO:")[0].outputs[0].logprobs is None


@pytest.mark.parametrize("prompts", [5, None, b"ROMEO:", ["ROMEO:", None], [b"ROMEO:"]], ids=repr)
def test_what_is_no_prompt(llm, prompts):
    with pytest.raises(InvalidRequestError, match="it must be a text or a list of token ids"):
        llm.generate(prompts)


def test_one_bad_prompt_leaves_nothing_behind(llm):
    with pytest.raises(InvalidRequestError, match="the prompt is empty"):
        llm.generate(["ROMEO:", "", "JULIET:"])
    with pytest.raises(InvalidRequestError, match="2 prompts came with 1 sampling parameters"):
        llm.generate(["ROMEO:", "JULIET:"], [SamplingParams()])
    assert not llm.engine.has_unfinished_requests
    assert llm.engine.scheduler.manager.device.num_used == 0


def test_an_interrupt_leaves_nothing_behind(llm):
    def interrupt(outputs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate(["ROMEO:", "JULIET:"], on_step=interrupt)
    assert not llm.engine.has_unfinished_requests
    assert llm.engine.scheduler.manager.device.num_used == 0
    llm.generate("ROMEO:")


@pytest.fixture
def ctrl_c_is_heard():
    """Even where the tests were started in the background, where a shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_is_heard")
def test_ctrl_c_does_not_interrupt_a_step(llm, monkeypatch):
    def pressed_within(plan):
        signal.raise_signal(signal.SIGINT)
        return execute(plan)

    execute, steps = llm.engine.runner.execute, llm.engine.num_steps
    monkeypatch.setattr(llm.engine.runner, "execute", pressed_within)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["ROMEO:", "JULIET:"])
    assert llm.engine.num_steps == steps + 1
    assert not llm.engine.has_unfinished_requests
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_prompt_in_numbers_of_numpy(llm):
    ids = llm.engine.tokenizer.encode("ROMEO:")
    params = SamplingParams(temperature=0, max_tokens=4)
    wanted = llm.generate("ROMEO:", params)[0].outputs[0].token_ids
    for prompt in (np.array(ids), list(np.array(ids))):
        assert llm.generate(prompt, params)[0].outputs[0].token_ids == wanted


def test_chat_needs_a_message(llm):
    with pytest.raises(InvalidRequestError, match="there is no message"):
        llm.chat([])


def test_chat_needs_a_template(llm):
    with pytest.raises(InvalidRequestError, match="no chat template"):
        llm.chat([{"role": "user", "content": "hi"}])


def test_unknown_dtype():
    with pytest.raises(ConfigurationError, match="no dtype 'int3'; choose auto, float64"):
        LLM(dtype="int3")


def test_the_chosen_pool_is_said(caplog):
    with caplog.at_level(logging.INFO, logger="minipaged"):
        llm = LLM(kv_cache_gib=0.01)
    blocks = llm.engine.scheduler.manager.device.num_blocks
    assert f"KV cache: {blocks} blocks of 16 tokens" in caplog.text
    assert "chosen from the memory budget" in caplog.text


def test_a_model_in_the_memory_of_the_cpu_is_not_read_by_a_gpu(monkeypatch):
    decoder, tokenizer = load_decoder("tiny")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    engine = build_engine(decoder, tokenizer, EngineOptions())
    assert isinstance(engine.runner.prepare_attention, GatheredAttention)
    options = EngineOptions(attention="cuda", num_blocks=8)
    with pytest.raises(ConfigurationError, match="device 'cuda', and the model is on 'cpu'"):
        build_engine(decoder, tokenizer, options)


def test_the_shipped_model_is_small_and_loads_in_its_type():
    decoder, tokenizer = load_decoder("tiny")
    assert decoder.config.num_kv_heads < decoder.config.num_heads
    assert tokenizer.vocab_size == decoder.config.vocab_size


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import minipaged", "torch"),
        ("import minipaged.memory.block_manager, minipaged.scheduling.scheduler", "torch"),
        ("import minipaged.engine.llm", "transformers"),
        ("import minipaged.engine.llm", "huggingface_hub"),
        ("import minipaged.cli", "matplotlib"),
        # Its compiler, which takes longer than PyTorch itself.
        ("import minipaged; minipaged.LLM('tiny', num_blocks=8)", "torch._dynamo"),
    ],
)
def test_imports_stay_light(statement, forbidden):
    code = f"import sys; {statement}; sys.exit({forbidden!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
