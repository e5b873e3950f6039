"""The command line. Heavy imports live inside the commands, so that --help answers at once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from madpo.launch.lifeline import LAUNCHER_PID, die_with_launcher
from madpo.trainer.errors import EXIT_USAGE, UserError

if TYPE_CHECKING:
    from madpo.launch.local import Task

app = typer.Typer(
    help="Train language models on preferences: MADPO, DPO and their relatives, with ZeRO-3.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[str, typer.Argument(help="YAML file", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="as in optim.lr=2e-6", metavar="SECTION.KEY=VALUE")
]
OfTask = Annotated[
    Literal["train", "sft", "reward"] | None,
    typer.Option("--task", help="read the config as that command does"),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="set an earlier run in output_dir aside")]


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    fresh: Fresh = False,
) -> None:
    """Train on this machine; continues a run that was cut off."""
    _train("train", config, overrides, fresh)


@app.command()
def sft(config: ConfigPath, overrides: Overrides = None, fresh: Fresh = False) -> None:
    """Train on completions (supervised); the objective is nll by default."""
    _train("sft", config, overrides, fresh)


@app.command()
def reward(config: ConfigPath, overrides: Overrides = None, fresh: Fresh = False) -> None:
    """Train a reward model; the objective is bradley_terry by default."""
    _train("reward", config, overrides, fresh)


@app.command("run")
def run_recipe(
    recipe: Annotated[Path, typer.Argument(help="YAML file of stages", metavar="RECIPE")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="as in vars.scale=0.2 or 'dpo-*.optim.lr=2e-6'", metavar="STAGE.KEY=VALUE"),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="stages that run at a time")] = 1,
    only: Annotated[
        list[str] | None, typer.Option(help="run this stage, and those that it depends on")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would run")] = False,
) -> None:
    """Run a recipe's stages; those that are done and unchanged are skipped."""
    from madpo.launch.recipes.runner import run

    raise typer.Exit(run(recipe, overrides or [], jobs, only or [], dry_run))


@app.command()
def evaluate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Evaluate the run's newest checkpoint, or its starting model, on the held-out split."""
    _run_task("evaluate", config, overrides)


@app.command()
def export(
    config: ConfigPath,
    overrides: Overrides = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="also write an adapter merged into its base")
    ] = False,
) -> None:
    """Write the run's newest checkpoint as a Hugging Face model folder."""
    _run_task("export", config, [*(overrides or []), *(["train.export_merged=true"] if merge else [])])


@app.command()
def annotate(
    config: ConfigPath,
    overrides: Overrides = None,
    folds: Annotated[
        int | None,
        typer.Option(help="train this many models, and score each example by one not trained on it"),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="score with this model; several: mean score")
    ] = None,
) -> None:
    """Score a data set's pairs with a reward model: margins for MADPO, MixDPO and similar objectives."""
    from madpo.launch import fold_models
    from madpo.trainer.config.schema import load

    overrides = list(overrides or [])
    overrides += [f"annotate.folds={folds}"] if folds is not None else []
    overrides += [f"annotate.models={json.dumps(model)}"] if model else []
    status = fold_models.train_folds(load(config, overrides, "annotate"), config, overrides)
    if status:
        raise typer.Exit(status)
    _run_task("annotate", config, overrides)


@app.command()
def generate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Sample completions of a data set's prompts from one or more models, judge them, make pairs of them."""
    _run_task("generate", config, overrides)


@app.command()
def probe(config: ConfigPath, overrides: Overrides = None) -> None:
    """Measure how well the starting model predicts its training set, and suggest a supervised objective."""
    _run_task("probe", config, overrides)


@app.command()
def show_data(
    config: ConfigPath,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("-n", "--count", min=0, help="groups to show")] = 3,
    task: OfTask = None,
) -> None:
    """Show training data as the model sees it: tokens, what is trained on, what was cut and dropped."""
    import datasets
    from rich.console import Console

    from madpo.trainer.config.schema import load
    from madpo.trainer.stages.show_data import show_data as show

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    show(load(config, overrides or [], task or "show-data"), count, Console(highlight=False))


@app.command("config")
def show_config(
    config: ConfigPath,
    overrides: Overrides = None,
    task: OfTask = None,
    plain: Annotated[bool, typer.Option("--plain", help="without comments")] = False,
) -> None:
    """Check a config and print it with every default filled in and every key explained."""
    from madpo.trainer.config.commented import commented
    from madpo.trainer.config.locate import located
    from madpo.trainer.config.schema import dump, load

    resolved = load(config, overrides or [], task or "config")
    print(dump(resolved) if plain else commented(resolved), end="")
    try:
        located(resolved)
    except UserError as error:
        print(f"note: {error}", file=sys.stderr)


@app.command("keys")
def show_keys(
    name: Annotated[
        str | None, typer.Argument(help="as in optim, lr or dpo; default: an overview", metavar="NAME")
    ] = None,
) -> None:
    """Explain the keys of a config's section, the parameters of an objective, or one key."""
    from madpo.launch.keys import explain_keys, terminal_width

    print(explain_keys(name, terminal_width()), end="")


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="YAML, JSON, Python or shell script", metavar="FILE")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="default: print it")] = None,
    source: Annotated[
        str | None, typer.Option("--from", help="trl, llamafactory, axolotl or openrlhf; default: recognised")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="sft, reward, dpo, kto, orpo, cpo or simpo; default: as the file says")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs that the file was written for")] = None,
) -> None:
    """Translate a config of TRL, LLaMA-Factory, Axolotl or OpenRLHF, and list what has no counterpart."""
    from madpo.launch.convert.command import run

    run(file, output, source, task, gpus)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders; several are overlaid")],
    output: Annotated[Path | None, typer.Option(help="default: report.html in the first run")] = None,
) -> None:
    """Write a self-contained HTML report of finished or running runs."""
    from madpo.trainer.reports.run_report import write_report

    print(f"report {write_report(runs, output or runs[0] / 'report.html')}")


@app.command()
def demo() -> None:
    """Fetch real preference data; train, evaluate, export and report in runs/demo."""
    from madpo.launch.demo import run_demo

    raise typer.Exit(run_demo())


bench_app = typer.Typer(help="Measure the loss head, or a training step, against its peers.")
app.add_typer(bench_app, name="bench")


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


def _train(task: Task, config: str, overrides: list[str] | None, fresh: bool) -> None:
    from madpo.launch import local
    from madpo.trainer.config.locate import located
    from madpo.trainer.config.schema import load

    resolved = load(config, overrides or [], task)
    located(resolved)  # before any rank is started
    folder = Path(resolved.output_dir)
    if fresh:
        from madpo.trainer.run_folder import set_aside

        set_aside(folder)
    status = local.run(task, config, overrides or [], resolved.launch)
    if status == 0:
        try:
            report([folder], None)
        except UserError as error:
            print(f"no report: {error}", file=sys.stderr)
        if resolved.train.export:
            print(f"model  {folder / 'model'}")
    raise typer.Exit(status)


def _run_task(task: Task, config: str, overrides: list[str] | None) -> None:
    from madpo.launch import local
    from madpo.trainer.config.locate import located
    from madpo.trainer.config.schema import load

    resolved = load(config, overrides or [], task)
    if task != "annotate":  # which may score with other models than the config's
        located(resolved)
    raise typer.Exit(local.run(task, config, overrides or [], resolved.launch))


def main() -> None:
    """The console script: a UserError ends in one line and exit status 2."""
    if LAUNCHER_PID in os.environ:  # a stage of `madpo run`
        die_with_launcher()
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)


if __name__ == "__main__":
    main()
