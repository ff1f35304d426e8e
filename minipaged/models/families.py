"""The model families, by the `model_type` of a config.json: what decoder each one describes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minipaged.errors import ModelLoadError
from minipaged.models import layouts
from minipaged.models.config import Activation, ModelConfig, RopeConfig
from minipaged.models.layouts import Layout

ACTIVATION_NAMES: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def _activation(name: str) -> Activation:
    if name not in ACTIVATION_NAMES:
        raise ModelLoadError(
            f"config.json names the activation {name!r}; supported are "
            f"{', '.join(sorted(ACTIVATION_NAMES))}"
        )
    return ACTIVATION_NAMES[name]


def _rope(config: dict[str, Any]) -> RopeConfig:
    """From `rope_theta` and `rope_scaling`, or `rope_parameters`, which holds both.

    Of a file with both kinds the first counts, as in transformers: somebody added it.
    """
    options = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = options.get("rope_theta") or config.get("rope_theta") or 10_000.0
    kind = options.get("rope_type") or options.get("type") or "default"
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", options["factor"])
    if kind == "llama3":
        return RopeConfig(
            theta,
            "llama3",
            options["factor"],
            options["low_freq_factor"],
            options["high_freq_factor"],
            options["original_max_position_embeddings"],
        )
    raise ModelLoadError(
        f"config.json asks for rotary scaling of type {kind!r}; supported are default, linear "
        "and llama3"
    )


def _tokens(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def _llama_like(
    config: dict[str, Any], qkv_bias: bool, window: int | None, qk_norm: bool = False
) -> ModelConfig:
    heads = config["num_attention_heads"]
    max_positions = config["max_position_embeddings"]
    if window is not None and _num_windowed_layers(config) < config["num_hidden_layers"]:
        # Blocks are freed for all layers or for none.  Up to the window's length every layer
        # is plain causal attention.
        window, max_positions = None, min(max_positions, window)
    attention_bias = config.get("attention_bias", False)
    return ModelConfig(
        family=config["model_type"],
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate_size=config["intermediate_size"],
        max_positions=max_positions,
        norm_eps=config["rms_norm_eps"],
        activation=_activation(config.get("hidden_act", "silu")),
        rope=_rope(config),
        qkv_bias=qkv_bias or attention_bias,
        output_bias=attention_bias,
        mlp_bias=config.get("mlp_bias", False),
        qk_norm=qk_norm,
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        sliding_window=window,
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=_tokens(config.get("eos_token_id")),
    )


def _llama(config: dict[str, Any]) -> ModelConfig:
    return _llama_like(config, qkv_bias=False, window=None)


def _mistral(config: dict[str, Any]) -> ModelConfig:
    return _llama_like(config, qkv_bias=False, window=config.get("sliding_window", 4096))


def _qwen2(config: dict[str, Any]) -> ModelConfig:
    return _llama_like(config, qkv_bias=True, window=_qwen_window(config))


def _qwen3(config: dict[str, Any]) -> ModelConfig:
    return _llama_like(config, qkv_bias=False, window=_qwen_window(config), qk_norm=True)


def _qwen_window(config: dict[str, Any]) -> int | None:
    if not config.get("use_sliding_window") or _num_windowed_layers(config) == 0:
        return None
    return config.get("sliding_window")


def _num_windowed_layers(config: dict[str, Any]) -> int:
    """How many layers have the sliding window, where the model has one."""
    if config.get("layer_types"):
        return config["layer_types"].count("sliding_attention")
    first = config.get("max_window_layers", 28) if "qwen" in config["model_type"] else 0
    return max(0, config["num_hidden_layers"] - first)


def _opt(config: dict[str, Any]) -> ModelConfig:
    if (config.get("word_embed_proj_dim") or config["hidden_size"]) != config["hidden_size"]:
        raise ModelLoadError(
            f"this OPT projects its embeddings (word_embed_proj_dim "
            f"{config['word_embed_proj_dim']}, hidden_size {config['hidden_size']}), as only "
            "OPT-350m does, and that is not supported; choose another size of OPT"
        )
    if not config.get("do_layer_norm_before", True):
        raise ModelLoadError(
            "this OPT normalizes after each layer (do_layer_norm_before is false), as only "
            "OPT-350m does, and that is not supported; choose another size of OPT"
        )
    heads = config["num_attention_heads"]
    bias = config.get("enable_bias", True)
    return ModelConfig(
        family="opt",
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=config["hidden_size"] // heads,
        intermediate_size=config["ffn_dim"],
        max_positions=config["max_position_embeddings"],
        norm="layer",
        activation=_activation(config.get("activation_function", "relu")),
        gated_mlp=False,
        rope=None,
        learned_position_offset=2,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=config.get("tie_word_embeddings", True),
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=_tokens(config.get("eos_token_id")),
    )


def _gpt2(config: dict[str, Any]) -> ModelConfig:
    for name, usual in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if config.get(name, usual) is not usual:
            raise ModelLoadError(
                f"this GPT-2 scales its attention in its own way ({name} is {config[name]}), and "
                "that is not supported; choose another one"
            )
    heads, hidden = config["n_head"], config["n_embd"]
    return ModelConfig(
        family="gpt2",
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        num_layers=config["n_layer"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=config.get("n_inner") or 4 * hidden,
        max_positions=config["n_positions"],
        norm="layer",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        activation=_activation(config.get("activation_function", "gelu_new")),
        gated_mlp=False,
        rope=None,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tie_word_embeddings=config.get("tie_word_embeddings", True),
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=_tokens(config.get("eos_token_id")),
    )


FAMILIES: dict[str, tuple[Callable[[dict[str, Any]], ModelConfig], Layout]] = {
    "llama": (_llama, layouts.LLAMA),
    "mistral": (_mistral, layouts.LLAMA),
    "qwen2": (_qwen2, layouts.LLAMA),
    "qwen3": (_qwen3, layouts.LLAMA),
    "opt": (_opt, layouts.OPT),
    "gpt2": (_gpt2, layouts.GPT2),
}


def read_config(config: dict[str, Any]) -> tuple[ModelConfig, Layout]:
    """The decoder that a config.json describes and the layout of its checkpoint.

    Raises ModelLoadError if they are not supported.
    """
    name = config.get("model_type")
    if name not in FAMILIES:
        raise ModelLoadError(
            f"the model is of type {name!r}; supported are {', '.join(sorted(FAMILIES))}"
        )
    if config.get("quantization_config"):
        raise ModelLoadError(
            "the checkpoint is quantized (config.json has a quantization_config), which is not "
            "supported; choose the plain one, or a GGUF file"
        )
    read, layout = FAMILIES[name]
    try:
        return read(config), layout
    except KeyError as error:
        raise ModelLoadError(f"config.json has no {error.args[0]!r}, which {name} needs") from error
