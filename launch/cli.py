"""The command line. Heavy imports live inside the commands, so that --help answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="set an earlier run in output_dir aside")] = False,
) -> None:
    """Train on this machine's GPUs (without one: on the CPU); continues a run that was cut off."""
    from madpo.launch import local
    from madpo.trainer.config import load

    resolved = load(config, overrides or [])
    folder = Path(resolved.output_dir)
    if fresh:
        set_aside(folder)
    status = local.run("train", config, overrides or [], resolved.launch)
    if status == 0:
        try:
            report([folder], None)
        except UserError as error:
            print(f"no report: {error}", file=sys.stderr)
        if resolved.train.export:
            print(f"model  {folder / 'model'}")
    raise typer.Exit(status)


@app.command()
def evaluate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Evaluate the run's newest checkpoint, or its starting model, on the held-out split."""
    _run_task("evaluate", config, overrides)


@app.command()
def export(
    config: ConfigPath,
    overrides: Overrides = None,
    merge: Annotated[bool, typer.Option("--merge", help="an adapter also as whole weights")] = False,
) -> None:
    """Write the run's newest checkpoint as a Hugging Face model folder."""
    _run_task("export", config, [*(overrides or []), *(["train.export_merged=true"] if merge else [])])


@app.command()
def annotate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Score a data set's pairs with a reward run's model: margins for MADPO, MixDPO and their like."""
    _run_task("annotate", config, overrides)


@app.command()
def probe(config: ConfigPath, overrides: Overrides = None) -> None:
    """Measure what the starting model knows of its training set, and suggest a supervised objective."""
    _run_task("probe", config, overrides)


@app.command("config")
def show_config(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check a config and print it with every default filled in."""
    from madpo.trainer.config import dump, load

    print(dump(load(config, overrides or [])), end="")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders; several are overlaid")],
    output: Annotated[Path | None, typer.Option(help="default: report.html in the first run")] = None,
) -> None:
    """Write a self-contained HTML report of finished or running runs."""
    from madpo.trainer.report import write_report

    print(f"report {write_report(runs, output or runs[0] / 'report.html')}")


@app.command()
def demo() -> None:
    """Fetch real preference data; train, evaluate, export and report on it in runs/demo."""
    from madpo.launch.demo import run_demo

    raise typer.Exit(run_demo())


@app.command()
def bench(
    shape: Annotated[list[str] | None, typer.Option(help="as in Llama-3.1-8B; default: all")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="completion rows; default: 512, 2048, 8192")] = None,
    head: Annotated[list[str] | None, typer.Option(help="as in madpo or TRL; default: all")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32")] = "bfloat16",
    iterations: Annotated[int | None, typer.Option(help="default: 20")] = None,
    output: Annotated[Path, typer.Option(help="folder of the results")] = Path("benchmarks/results"),
) -> None:
    """Measure the loss head against its peers, after checking that each is right."""
    from madpo.launch.bench import run_bench

    run_bench(shape or [], rows or [], head or [], dtype, iterations, output)


def set_aside(folder: Path) -> None:
    """Rename an earlier run, so that a fresh one starts and nothing is lost."""
    if folder.exists():
        number = 1
        while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        folder.rename(target)
        print(f"the earlier run is now {target}")


def _run_task(task: Task, config: str, overrides: list[str] | None) -> None:
    from madpo.launch import local
    from madpo.trainer.config import load

    resolved = load(config, overrides or [])
    raise typer.Exit(local.run(task, config, overrides or [], resolved.launch))


def main() -> None:
    """The console script: errors of the user end in one line and status 2."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)


if __name__ == "__main__":
    main()
