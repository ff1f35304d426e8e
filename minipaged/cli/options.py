"""The options that several commands share, and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelOption = Annotated[
    str, typer.Option("--model", help="tiny, smollm2, a directory, a GGUF file or a hub id")
]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64")]
BlockSizeOption = Annotated[int, typer.Option(help="tokens per KV block")]
NumBlocksOption = Annotated[
    int | None, typer.Option(help="blocks of the pool; sized from the memory if left out")
]
SeqsOption = Annotated[int, typer.Option(help="sequences that run at a time")]
BudgetOption = Annotated[int | None, typer.Option(help="tokens computed per step")]
PrefixOption = Annotated[
    bool, typer.Option("--prefix-cache/--no-prefix-cache", help="share blocks of equal prefixes")
]
PreemptionOption = Annotated[str, typer.Option(help="recompute, swap or auto")]
SwapOption = Annotated[
    float | None, typer.Option("--swap-gib", help="memory to swap to; the pool's size if left out")
]
AttentionOption = Annotated[
    str,
    typer.Option(
        help="auto, torch, native (compiled), cuda (the default with a GPU), emulated, reference"
    ),
]
SeedOption = Annotated[int, typer.Option(help="of the random streams")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="write the figures to a file")]
MaxTokensOption = Annotated[int, typer.Option(help="output tokens per prompt")]
TemperatureOption = Annotated[float, typer.Option(help="0 is greedy")]
TopKOption = Annotated[int, typer.Option(help="draw among the k likeliest; 0 for all")]
TopPOption = Annotated[float, typer.Option(help="draw among the likeliest that reach this mass")]
