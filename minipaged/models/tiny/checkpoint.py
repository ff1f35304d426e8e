"""Writes a decoder of the LLaMA family as an ordinary Hugging Face directory, in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from minipaged.models.config import ModelConfig
from minipaged.models.decoder import Decoder


def hugging_face_config(config: ModelConfig) -> dict[str, object]:
    """config.json for this decoder."""
    assert config.rope is not None
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.activation,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids[0],
        "torch_dtype": "bfloat16",
    }


def hugging_face_weights(decoder: Decoder) -> dict[str, Tensor]:
    """The decoder's tensors under the names of LlamaForCausalLM, fused projections taken apart."""
    config = decoder.config
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    state = decoder.state_dict()
    weights = {
        "model.embed_tokens.weight": state["embed_tokens.weight"],
        "model.norm.weight": state["final_norm.weight"],
    }
    if not config.tie_word_embeddings:
        weights["lm_head.weight"] = state["lm_head.weight"]
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        query, key, value = state[ours + "qkv_proj.weight"].split((heads, kv_heads, kv_heads))
        gate, up = state[ours + "up_proj.weight"].chunk(2)
        weights |= {
            theirs + "input_layernorm.weight": state[ours + "attention_norm.weight"],
            theirs + "self_attn.q_proj.weight": query,
            theirs + "self_attn.k_proj.weight": key,
            theirs + "self_attn.v_proj.weight": value,
            theirs + "self_attn.o_proj.weight": state[ours + "o_proj.weight"],
            theirs + "post_attention_layernorm.weight": state[ours + "mlp_norm.weight"],
            theirs + "mlp.gate_proj.weight": gate,
            theirs + "mlp.up_proj.weight": up,
            theirs + "mlp.down_proj.weight": state[ours + "down_proj.weight"],
        }
    return {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()}


def save_checkpoint(decoder: Decoder, tokenizer: Tokenizer, directory: Path) -> None:
    """Write config.json, model.safetensors and tokenizer.json."""
    directory.mkdir(parents=True, exist_ok=True)
    config = json.dumps(hugging_face_config(decoder.config), indent=2)
    (directory / "config.json").write_text(config + "\n", encoding="utf-8")
    save_file(hugging_face_weights(decoder), directory / "model.safetensors", {"format": "pt"})
    tokenizer.save(str(directory / "tokenizer.json"))
