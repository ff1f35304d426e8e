"""`minipaged serve`: the OpenAI-compatible server and its dashboard."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from minipaged.cli.generate import load
from minipaged.cli.options import (
    AttentionOption,
    BlockSizeOption,
    BudgetOption,
    DtypeOption,
    LessonsOption,
    ModelOption,
    NumBlocksOption,
    PreemptionOption,
    RanksOption,
    SeedOption,
    SeqsOption,
    SwapOption,
    needs_extra,
    use_lessons,
)


def serve(
    model: ModelOption = "tiny",
    served_model_name: Annotated[
        str | None, typer.Option(help="what clients call the model; its last path component")
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen at")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="MINIPAGED_API_KEY",
            help="accepted key, may be given several times; better in the environment, where "
            "other users of the machine cannot read it",
        ),
    ] = None,
    isolate_keys: Annotated[
        bool, typer.Option("--isolate-keys", help="no prefix is shared between keys")
    ] = False,
    max_queued: Annotated[int, typer.Option(help="requests that may wait to run")] = 256,
    max_body: Annotated[int, typer.Option(help="bytes of a request's body")] = 4 * 2**20,
    grace: Annotated[float, typer.Option(help="seconds to end in after a signal")] = 30,
    dtype: DtypeOption = "auto",
    block_size: BlockSizeOption = 16,
    num_blocks: NumBlocksOption = None,
    max_num_seqs: SeqsOption = 256,
    max_num_batched_tokens: BudgetOption = None,
    policy: Annotated[str, typer.Option(help="fcfs, priority or shortest")] = "fcfs",
    preemption: PreemptionOption = "recompute",
    swap_gib: SwapOption = None,
    prefix_cache: Annotated[
        bool, typer.Option("--prefix-cache/--no-prefix-cache", help="share equal prefixes")
    ] = True,
    attention: AttentionOption = "auto",
    tensor_parallel_size: RanksOption = None,
    seed: SeedOption = 0,
    lessons: LessonsOption = None,
) -> None:
    """Serve a model to OpenAI's clients, until Ctrl-C or SIGTERM."""
    use_lessons(lessons)
    with needs_extra("the server", "serving"):
        from minipaged.serving.server import Server, ServerOptions, open_socket, url_of

    options = ServerOptions(
        model=served_model_name or os.path.basename(os.path.abspath(model)),
        host=host,
        port=port,
        api_keys=api_key or (),
        isolate_keys=isolate_keys,
        max_queued=max_queued,
        max_body=max_body,
        grace=grace,
    )
    with open_socket(options) as sock:
        engine = load(
            model,
            dtype=dtype,
            block_size=block_size,
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            policy=policy,
            preemption=preemption,
            swap_space_gib=swap_gib,
            enable_prefix_caching=prefix_cache,
            attention=attention,
            tensor_parallel_size=tensor_parallel_size,
            seed=seed,
        )
        url = url_of(sock)

        def announce() -> None:
            typer.echo(f"{options.model} is served at {url} (API: {url}/v1)")
            if not options.is_local and not options.api_keys:
                typer.echo("minipaged: anybody who reaches it may use it; set --api-key", err=True)

        server = Server(engine, options, announce)
        server.run(sockets=[sock])
    if server.has_failed:
        raise typer.Exit(1)
