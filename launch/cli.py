"""The command line. Heavy imports live inside the commands, so that --help answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from madpo.launch import data_commands  # noqa: F401
from madpo.launch.app import (
    AnyTask,
    ConfigPath,
    Extend,
    Fresh,
    OfTask,
    Overrides,
    app,
    command,
    loaded,
    run_task,
)
from madpo.launch.bench_commands import bench_app
from madpo.launch.console_log import outlive_readers
from madpo.launch.help import GROUPS, LOOK, MODELS, START, TRAIN, guide
from madpo.launch.lifeline import LAUNCHER_PID, die_with_launcher
from madpo.launch.templates import commands, templates, write
from madpo.trainer.errors import UserError

if TYPE_CHECKING:
    from madpo.launch.local import Task

app.add_typer(
    bench_app,
    name="bench",
    help="Measure the loss head, or a training step, against its peers.",
    rich_help_panel=LOOK,
    epilog=guide("madpo bench step --lora", "docs/throughput.md"),
)


@command(START, "madpo init my.yaml --template lora", "configs/README.md")
def init(
    name: Annotated[
        Path | None, typer.Argument(help="file to write; default: the template's name", metavar="NAME")
    ] = None,
    template: Annotated[
        str,
        typer.Option("--template", "-t", help="see --list", autocompletion=lambda: list(templates())),
    ] = "dpo",
    show_list: Annotated[bool, typer.Option("--list", help="list the templates and exit")] = False,
) -> None:
    """Write a commented config to start from."""
    if show_list:
        width = max(map(len, templates()))
        for each, title in templates().items():
            print(f"{each:{width}}  {title}")
        return
    target = Path(f"{template}.yaml") if name is None else name
    paths = write(template, target if target.suffix else target.with_suffix(".yaml"))
    print(f"wrote {' and '.join(map(str, paths))}; look through it, then:")
    for line in commands(paths[0].read_text()):
        print(f"  {line}")


@command(START, "madpo convert dpo.yaml -o my.yaml", "docs/coming_from.md")
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
    """Translate a config of TRL, LLaMA-Factory, Axolotl or OpenRLHF.

    What has no counterpart is listed.
    """
    from madpo.launch.convert.command import run

    run(file, output, source, task, gpus)


@command(START, "madpo demo", "docs/sentiment.md")
def demo() -> None:
    """Fetch preference data; train, evaluate and report in runs/demo."""
    from madpo.launch.demo import run_demo

    raise typer.Exit(run_demo())


@command(TRAIN, "madpo train my.yaml optim.lr=2e-6 output_dir=runs/faster", "docs/resume.md")
def train(
    config: ConfigPath, overrides: Overrides = None, fresh: Fresh = False, extend: Extend = False
) -> None:
    """Train on this machine; continues a run that was stopped."""
    _train("train", config, overrides, fresh, extend)


@command(TRAIN, "madpo sft my_sft.yaml", "docs/data.md")
def sft(
    config: ConfigPath, overrides: Overrides = None, fresh: Fresh = False, extend: Extend = False
) -> None:
    """Train on answers (supervised); loss nll by default."""
    _train("sft", config, overrides, fresh, extend)


@command(TRAIN, "madpo reward my_reward.yaml", "docs/objectives.md")
def reward(
    config: ConfigPath, overrides: Overrides = None, fresh: Fresh = False, extend: Extend = False
) -> None:
    """Train a reward model; loss bradley_terry by default."""
    _train("reward", config, overrides, fresh, extend)


@command(TRAIN, "madpo submit my.yaml --nodes 4 --gpus-per-node 8 -s time=24:00:00", "docs/clusters.md")
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0)] = 8,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="on nodes without GPUs")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--slurm", "-s", help="option of sbatch, as in partition=gpu")
    ] = None,
    task: AnyTask = "train",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the job, and when it could run")] = False,
) -> None:
    """Submit a run to Slurm; the job comes back until it is done."""
    resolved = loaded(config, overrides or [], task)
    from madpo.launch.submit import Place
    from madpo.launch.submit import submit as run

    gpus = gpus_per_node if ranks_per_node is None else 0
    raise typer.Exit(run(resolved, task, Place(nodes, gpus, ranks_per_node, option or []), dry_run))


@command(TRAIN, "madpo run my_recipe.yaml --dry-run", "docs/recipes.md", name="run")
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
    """Run a recipe of stages; what is done and unchanged is skipped."""
    from madpo.launch.recipes.runner import run

    outlive_readers()
    raise typer.Exit(run(recipe, overrides or [], jobs, only or [], dry_run))


@command(MODELS, "madpo evaluate runs/mine", "docs/metrics.md")
def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    base: Annotated[
        bool, typer.Option("--base", help="evaluate the model that training starts from")
    ] = False,
) -> None:
    """Evaluate a run's newest checkpoint on the held-out split."""
    run_task("evaluate", config, overrides, ["--base"] if base else [])


@command(MODELS, "madpo export runs/mine --merge", "docs/models.md")
def export(
    config: ConfigPath,
    overrides: Overrides = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="also write an adapter merged into its base")
    ] = False,
) -> None:
    """Write a run's newest checkpoint as a Hugging Face folder."""
    run_task("export", config, [*(overrides or []), *(["train.export_merged=true"] if merge else [])])


@command(LOOK, "madpo config my.yaml optim.lr=2e-6", "docs/config.md", name="config")
def show_config(
    config: ConfigPath,
    overrides: Overrides = None,
    task: OfTask = None,
    plain: Annotated[bool, typer.Option("--plain", help="without comments")] = False,
) -> None:
    """Check a config; print it with all defaults, each key explained."""
    from madpo.launch.keys import terminal_width
    from madpo.trainer.config.commented import WIDTH, commented
    from madpo.trainer.config.locate import located
    from madpo.trainer.config.schema import dump, load

    resolved = load(config, overrides or [], task or "config")
    print(dump(resolved) if plain else commented(resolved, terminal_width() or WIDTH), end="")
    try:
        located(resolved)
    except UserError as error:
        print(f"note: {error}", file=sys.stderr)


@command(LOOK, "madpo keys optim", "docs/config.md", name="keys")
def show_keys(
    name: Annotated[
        str | None, typer.Argument(help="as in optim, lr or dpo; default: an overview", metavar="NAME")
    ] = None,
) -> None:
    """Explain the keys of a section or of an objective, or one key."""
    from madpo.launch.keys import explain_keys, terminal_width

    print(explain_keys(name, terminal_width()), end="")


@command(LOOK, "madpo status runs/mine", "docs/resume.md")
def status(run: Annotated[Path, typer.Argument(help="folder of a run, also of a running one")]) -> None:
    """Show whether a run lives, where its ranks are, how it ended."""
    from madpo.launch.status import show

    raise typer.Exit(show(run))


@command(LOOK, "madpo report runs/madpo runs/dpo", "docs/metrics.md")
def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders; several are overlaid")],
    output: Annotated[
        Path | None,
        typer.Option(help="default: report.html in the run, or comparison.html in the first"),
    ] = None,
) -> None:
    """Write an HTML report of one or more runs, also of running ones."""
    from madpo.trainer.reports.run_report import write_report

    page = "report.html" if len(runs) == 1 else "comparison.html"
    print(f"report {write_report(runs, output or runs[0] / page)}")


def _train(task: Task, config: str, overrides: list[str] | None, fresh: bool, extend: bool) -> None:
    outlive_readers()
    resolved = loaded(config, overrides or [], task)
    folder = Path(resolved.output_dir)
    from madpo.launch import local
    from madpo.launch.preflight import check

    if fresh and extend:
        raise UserError("--fresh begins anew and --extend goes on; give one of them")
    if fresh and Path(config).resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--fresh: {config} would move with {folder}; copy it out first")
    check(resolved, task)
    if fresh:
        from madpo.trainer.run_folder import set_aside

        set_aside(folder)
    flags = ["--extend"] if extend else []
    status = local.run(task, config, overrides or [], resolved, flags)
    if status == 0:
        try:
            report([folder], None)
        except UserError as error:
            print(f"no report: {error}", file=sys.stderr)
        if resolved.train.export:
            print(f"model  {folder / 'model'}")
    raise typer.Exit(status)


app.registered_commands.sort(key=lambda each: GROUPS.index(str(each.rich_help_panel)))


def main() -> None:
    """The console script: a UserError ends in one line and its exit status."""
    if LAUNCHER_PID in os.environ:  # a stage of `madpo run`
        die_with_launcher()
    try:
        app(prog_name="madpo")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)


if __name__ == "__main__":
    main()
