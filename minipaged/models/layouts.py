"""How the tensors of a checkpoint map to the parameters of the decoder.

The tables are the whole knowledge of a layout: which tensors, stacked row upon row, make
which parameter.  Reading them is `weights.py`'s work.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Table = dict[str, tuple[str, ...]]
"""Parameter of the decoder -> tensors of the checkpoint; `{i}` is the layer."""

LLAMA_TABLE: Table = {
    "embed_tokens.weight": ("embed_tokens.weight",),
    "layers.{i}.attention_norm.weight": ("layers.{i}.input_layernorm.weight",),
    "layers.{i}.qkv_proj.weight": (
        "layers.{i}.self_attn.q_proj.weight",
        "layers.{i}.self_attn.k_proj.weight",
        "layers.{i}.self_attn.v_proj.weight",
    ),
    "layers.{i}.qkv_proj.bias": (
        "layers.{i}.self_attn.q_proj.bias",
        "layers.{i}.self_attn.k_proj.bias",
        "layers.{i}.self_attn.v_proj.bias",
    ),
    "layers.{i}.q_norm.weight": ("layers.{i}.self_attn.q_norm.weight",),
    "layers.{i}.k_norm.weight": ("layers.{i}.self_attn.k_norm.weight",),
    "layers.{i}.o_proj.weight": ("layers.{i}.self_attn.o_proj.weight",),
    "layers.{i}.o_proj.bias": ("layers.{i}.self_attn.o_proj.bias",),
    "layers.{i}.mlp_norm.weight": ("layers.{i}.post_attention_layernorm.weight",),
    "layers.{i}.up_proj.weight": (
        "layers.{i}.mlp.gate_proj.weight",
        "layers.{i}.mlp.up_proj.weight",
    ),
    "layers.{i}.up_proj.bias": ("layers.{i}.mlp.gate_proj.bias", "layers.{i}.mlp.up_proj.bias"),
    "layers.{i}.down_proj.weight": ("layers.{i}.mlp.down_proj.weight",),
    "layers.{i}.down_proj.bias": ("layers.{i}.mlp.down_proj.bias",),
    "final_norm.weight": ("norm.weight",),
    "lm_head.weight": ("lm_head.weight",),
}

OPT_TABLE: Table = {
    "embed_tokens.weight": ("embed_tokens.weight",),
    "embed_positions.weight": ("embed_positions.weight",),
    "layers.{i}.attention_norm.*": ("layers.{i}.self_attn_layer_norm.*",),
    "layers.{i}.qkv_proj.*": (
        "layers.{i}.self_attn.q_proj.*",
        "layers.{i}.self_attn.k_proj.*",
        "layers.{i}.self_attn.v_proj.*",
    ),
    "layers.{i}.o_proj.*": ("layers.{i}.self_attn.out_proj.*",),
    "layers.{i}.mlp_norm.*": ("layers.{i}.final_layer_norm.*",),
    "layers.{i}.up_proj.*": ("layers.{i}.fc1.*",),
    "layers.{i}.down_proj.*": ("layers.{i}.fc2.*",),
    "final_norm.*": ("final_layer_norm.*",),
    "lm_head.weight": ("lm_head.weight",),
}

GPT2_TABLE: Table = {
    "embed_tokens.weight": ("wte.weight",),
    "embed_positions.weight": ("wpe.weight",),
    "layers.{i}.attention_norm.*": ("h.{i}.ln_1.*",),
    "layers.{i}.qkv_proj.*": ("h.{i}.attn.c_attn.*",),
    "layers.{i}.o_proj.*": ("h.{i}.attn.c_proj.*",),
    "layers.{i}.mlp_norm.*": ("h.{i}.ln_2.*",),
    "layers.{i}.up_proj.*": ("h.{i}.mlp.c_fc.*",),
    "layers.{i}.down_proj.*": ("h.{i}.mlp.c_proj.*",),
    "final_norm.*": ("ln_f.*",),
    "lm_head.weight": ("lm_head.weight",),
}


GGUF_TABLE: Table = {
    "embed_tokens.weight": ("token_embd.weight",),
    "layers.{i}.attention_norm.weight": ("blk.{i}.attn_norm.weight",),
    "layers.{i}.qkv_proj.*": ("blk.{i}.attn_q.*", "blk.{i}.attn_k.*", "blk.{i}.attn_v.*"),
    "layers.{i}.o_proj.*": ("blk.{i}.attn_output.*",),
    "layers.{i}.mlp_norm.weight": ("blk.{i}.ffn_norm.weight",),
    "layers.{i}.up_proj.weight": ("blk.{i}.ffn_gate.weight", "blk.{i}.ffn_up.weight"),
    "layers.{i}.down_proj.weight": ("blk.{i}.ffn_down.weight",),
    "final_norm.weight": ("output_norm.weight",),
    "lm_head.weight": ("output.weight",),
}


@dataclass(frozen=True)
class Layout:
    """One way to write a checkpoint.

    prefixes: what may stand before the names of the table, as some checkpoints are of the
        bare model and some of the model with its head.
    transposed: tensors stored as [in, out], by pattern.
    ignored: tensors that hold nothing to learn, by pattern.
    """

    table: Table
    prefixes: tuple[str, ...] = ("model.",)
    transposed: str = r"(?!)"
    ignored: str = r".*rotary_emb\.inv_freq"

    def sources(self, parameter: str) -> tuple[str, ...]:
        """Tensors of the checkpoint, without prefix, that make this parameter of the decoder."""
        for pattern, names in self.table.items():
            regex = (
                re.escape(pattern).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\*", r"(?P<s>\w+)")
            )
            match = re.fullmatch(regex, parameter)
            if match:
                found = {"i": "", "s": "", **match.groupdict()}
                return tuple(
                    name.replace("{i}", found["i"]).replace("*", found["s"]) for name in names
                )
        raise KeyError(parameter)

    def strip_prefix(self, name: str) -> str:
        """The name as the table has it."""
        for prefix in self.prefixes:
            name = name.removeprefix(prefix)
        return name


LLAMA = Layout(LLAMA_TABLE)
OPT = Layout(OPT_TABLE, prefixes=("model.", "decoder."))
GPT2 = Layout(
    GPT2_TABLE,
    prefixes=("transformer.",),
    transposed=r"h\.\d+\.(attn|mlp)\.c_(attn|proj|fc)\.weight",
    ignored=r"h\.\d+\.attn\.(bias|masked_bias)",
)
GGUF = Layout(GGUF_TABLE, prefixes=(), ignored=r"rope_freqs\.weight")
