"""The commands `madpo bench` and `madpo bench step` with their options; heavy imports are inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

bench_app = typer.Typer()


@bench_app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    shape: Annotated[list[str] | None, typer.Option(help="as in Llama-3.1-8B; default: four of six")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="scored tokens, as in 512; default: 8192")] = None,
    head: Annotated[list[str] | None, typer.Option(help="as in madpo or TRL; default: all")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32")] = "bfloat16",
    iterations: Annotated[int | None, typer.Option(help="default: 20")] = None,
    output: Annotated[Path, typer.Option(help="folder of the results")] = Path("benchmarks/results"),
    everything: Annotated[
        bool, typer.Option("--all", help="every shape, size and variant: most of an hour")
    ] = False,
    variants: Annotated[
        bool, typer.Option("--variants/--no-variants", help="a frozen head, saturation, given logits")
    ] = True,
) -> None:
    """Measure the loss head against its peers, after checking each against float64; or run COMMAND."""
    if context.invoked_subcommand is not None:
        return
    from madpo.launch.bench import run_bench

    run_bench(shape or [], rows or [], head or [], dtype, iterations, output, everything, variants)


@bench_app.command("step")
def bench_step(
    model: Annotated[str, typer.Option(help="tiny, tiny-32k, Llama-3.2-1B or Qwen2.5-0.5B")] = "tiny",
    data: Annotated[str, typer.Option(help="lengths as in ultrafeedback or hh, or demo")] = "ultrafeedback",
    lora: Annotated[bool, typer.Option("--lora", help="train an adapter, not all weights")] = False,
    ranks: Annotated[int, typer.Option(help="processes; several: with ZeRO-3")] = 1,
    pairs: Annotated[int | None, typer.Option(min=1, help="pairs of a step; default: 8, on a GPU 64")] = None,
    max_length: Annotated[int, typer.Option(min=4, help="most tokens of a sequence")] = 1024,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16 (default on a GPU)")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="steps of each contender; default: 12")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="threads of all ranks together; default: torch's")
    ] = None,
    contender: Annotated[list[str] | None, typer.Option(help="as in madpo or TRL; default: all")] = None,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="measure growth with tokens and pairs instead")
    ] = False,
    output: Annotated[Path, typer.Option(help="folder of the results")] = Path("benchmarks/results"),
) -> None:
    """Measure a training step against TRL's, and against our own with one feature off."""
    from madpo.benchmarks.step import run as step
    from madpo.launch.bench import run_scaling, run_step_bench

    if scaling:
        run_scaling(model, rounds or 3, output)
        return

    selected = contender or []
    settings = step.make_settings(
        model, data, lora, ranks, pairs, max_length, dtype, rounds, threads, selected
    )
    run_step_bench(settings, output)
