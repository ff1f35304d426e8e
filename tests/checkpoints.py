"""Small random checkpoints of every family, written by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 56}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
GPT2_SIZES = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 160, "vocab_size": 97}
GPT2_SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

# Name of a variant -> class of its configuration in transformers, and the options.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("OPTConfig", {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "opt-untied": (
        "OPTConfig",
        {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32, "tie_word_embeddings": False},
    ),
    "gpt2": ("GPT2Config", GPT2_SIZES),
    "llama2": ("LlamaConfig", {**GROUPED, "num_key_value_heads": 4}),
    "llama3.1": ("LlamaConfig", {**GROUPED, "rope_parameters": LLAMA3_ROPE}),
    "llama-linear": ("LlamaConfig", {**GROUPED, "rope_parameters": LINEAR_ROPE}),
    "llama-biased-tied": (
        "LlamaConfig",
        {
            **GROUPED,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 12,
            "tie_word_embeddings": True,
        },
    ),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": None}),
    "mistral-window": ("MistralConfig", {**GROUPED, "sliding_window": 11}),
    "qwen2-window": (
        "Qwen2Config",
        {**GROUPED, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    ),
    "qwen2": ("Qwen2Config", {**GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 12}),
}


def write_checkpoint(variant: str, directory: Path, **save_options: Any) -> Any:
    """Save a random checkpoint; returns the model of transformers, in eval mode.

    Weights are spread wide enough for the largest logit to be clear of the second.
    """
    transformers = pytest.importorskip("transformers")
    class_name, options = VARIANTS[variant]
    config = getattr(transformers, class_name)(**options)
    torch.manual_seed(sum(map(ord, variant)))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            elif "norm" in name or "ln_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=0.1)
    model.save_pretrained(directory, **save_options)
    return model


def greedy(model: Any) -> Callable[..., Any]:
    """Greedy generation of transformers for a batch of prompts of different lengths."""

    @torch.inference_mode()
    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        out = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
        )
        return out[:, longest:].tolist()

    return generate


def beams(model: Any) -> Callable[..., list[tuple[list[int], float]]]:
    """A function that gives (output token ids, score) of the hypotheses of a beam search."""

    def search(
        prompt: list[int], options: dict[str, Any], ends: tuple[int, ...], max_tokens: int
    ) -> list[tuple[list[int], float]]:
        tokens = torch.tensor([prompt])
        result = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            num_beams=options["best_of"],
            num_return_sequences=options["n"],
            length_penalty=options.get("length_penalty", 1.0),
            early_stopping=options.get("early_stopping", False),
            min_new_tokens=options.get("min_tokens", 0),
            max_new_tokens=max_tokens,
            eos_token_id=list(ends),
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        hypotheses = []
        for row, score in zip(result.sequences.tolist(), result.sequences_scores, strict=True):
            output = row[len(prompt) :]
            length = next((i + 1 for i, t in enumerate(output) if t in ends), len(output))
            hypotheses.append((output[:length], score.item()))
        return hypotheses

    return search
