"""GGUF files: a decoder written in that format is read back; damaged ones are refused."""

import dataclasses

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipaged.engine.naive import ContiguousCache
from minipaged.errors import ModelLoadError
from minipaged.models.config import ModelConfig, RopeConfig
from minipaged.models.decoder import Decoder
from minipaged.models.gguf_file import GGUFFile, neighbours_to_halves
from minipaged.models.loader import load_decoder

CONFIG = ModelConfig(
    family="llama",
    vocab_size=260,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=64,
    max_positions=48,
    eos_token_ids=(1,),
    bos_token_id=0,
)


def to_neighbours(rows, heads):
    """The inverse of what the reader does, as a converter to GGUF would write it."""
    halves = rows.reshape(heads, 2, -1, rows.shape[1])
    return halves.transpose(0, 2, 1, 3).reshape(rows.shape)


def write_gguf(path, decoder, architecture="llama", pre="default", model="gpt2"):
    c = decoder.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(c.num_layers)
    writer.add_context_length(c.max_positions)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope.theta)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    alphabet = sorted(__import__("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<bos>", "<eos>", *alphabet, "ab", "abc"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * 258)
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    state = {name: tensor.detach().numpy() for name, tensor in decoder.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["embed_tokens.weight"])
    writer.add_tensor("output.weight", state["lm_head.weight"])
    writer.add_tensor("output_norm.weight", state["final_norm.weight"])
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    for i in range(c.num_layers):
        ours, theirs = f"layers.{i}.", f"blk.{i}."
        query, key, value = np.split(state[ours + "qkv_proj.weight"], [q, q + kv])
        gate, up = np.split(state[ours + "up_proj.weight"], 2)
        for name, tensor in {
            "attn_norm": state[ours + "attention_norm.weight"],
            "attn_q": to_neighbours(query, c.num_heads),
            "attn_k": to_neighbours(key, c.num_kv_heads),
            "attn_v": value,
            "attn_output": state[ours + "o_proj.weight"],
            "ffn_norm": state[ours + "mlp_norm.weight"],
            "ffn_gate": gate,
            "ffn_up": up,
            "ffn_down": state[ours + "down_proj.weight"],
        }.items():
            writer.add_tensor(f"{theirs}{name}.weight", np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_llama_3_begins_with_its_token(decoder, tmp_path):
    write_gguf(tmp_path / "model.gguf", decoder, pre="llama-bpe")
    assert GGUFFile(tmp_path / "model.gguf").tokenizer().encode("abc") == [0, 259]


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    return Decoder(CONFIG).requires_grad_(False)


@pytest.fixture(scope="module")
def file(decoder, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, decoder)
    return path


@torch.inference_mode()
def test_a_decoder_survives_the_format(decoder, file):
    loaded, _ = load_decoder(file)
    assert loaded.config.norm_eps == pytest.approx(CONFIG.norm_eps)  # float32 in the file
    assert dataclasses.replace(loaded.config, norm_eps=CONFIG.norm_eps) == CONFIG
    # Plain numbers, though those of the file are numpy's.
    assert {type(value) for value in vars(loaded.config).values()} <= (
        {int, float, str, bool, tuple, RopeConfig, type(None)}
    )
    tokens = torch.arange(30)
    torch.testing.assert_close(
        loaded(tokens, tokens, ContiguousCache().attend),
        decoder(tokens, tokens, ContiguousCache().attend),
        rtol=1e-4,
        atol=1e-5,
    )


@given(heads=st.integers(1, 4), half=st.integers(1, 5))
def test_rows_of_rotary_pairs(heads, half):
    rows = np.arange(heads * half * 2 * 3).reshape(heads * half * 2, 3)
    restored = neighbours_to_halves(torch.from_numpy(to_neighbours(rows, heads).copy()), heads)
    assert np.array_equal(restored.numpy(), rows)


@given(text=st.text(max_size=30))
def test_the_tokenizer_of_the_file(file, text):
    tokenizer = GGUFFile(file).tokenizer()
    tokens = tokenizer.encode(text)
    if "<" not in text:
        assert tokenizer.decode(tokens) == text
    assert tokenizer.render_chat([{"role": "user", "content": text}]) == text


@pytest.mark.parametrize("keep", [0, 3, 100, 5000, -64])
def test_a_truncated_file(file, tmp_path, keep):
    path = tmp_path / "short.gguf"
    path.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match="is no GGUF file, or is cut short"):
        load_decoder(path)


def test_what_is_not_supported_is_named(decoder, tmp_path):
    for options, message in [
        ({"architecture": "mamba"}, "architecture 'mamba'"),
        ({"model": "llama"}, "tokenizer of kind 'llama'"),
        ({"pre": "unheard-of"}, "by the rule 'unheard-of'; supported are default"),
    ]:
        path = tmp_path / "model.gguf"
        write_gguf(path, decoder, **options)
        with pytest.raises(ModelLoadError, match=message):
            load_decoder(path)
