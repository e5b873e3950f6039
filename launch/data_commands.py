"""The commands that read, score or make data."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from madpo.launch.app import ConfigPath, OfTask, Overrides, command, loaded, run_task
from madpo.launch.console_log import outlive_readers
from madpo.launch.help import DATA


@command(DATA, "madpo annotate runs/reward --folds 3", "docs/recipes.md")
def annotate(
    config: ConfigPath,
    overrides: Overrides = None,
    folds: Annotated[
        int | None,
        typer.Option(
            help="split the prompts into K folds, train a model without each, score the fold with it",
            metavar="K",
        ),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="score with this model; several: mean score")
    ] = None,
) -> None:
    """Score pairs with a reward model: the margins that MADPO needs."""
    outlive_readers()
    overrides = list(overrides or [])
    overrides += [f"annotate.folds={folds}"] if folds is not None else []
    overrides += [f"annotate.models={json.dumps(model)}"] if model else []
    resolved = loaded(config, overrides, "annotate")
    from madpo.launch import fold_models, local
    from madpo.launch.preflight import check

    check(resolved, "annotate")
    status = fold_models.train_folds(resolved, config, overrides)
    status = status or local.run("annotate", config, overrides, resolved)
    if status:
        raise typer.Exit(status)


@command(DATA, "madpo generate my.yaml 'generate={num_completions: 4}'", "docs/generate.md")
def generate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Sample answers to a data set's prompts, judge them, make pairs."""
    run_task("generate", config, overrides)


@command(DATA, "madpo probe my_sft.yaml", "docs/objectives.md")
def probe(config: ConfigPath, overrides: Overrides = None) -> None:
    """Measure how well a model knows its training set already."""
    run_task("probe", config, overrides)


@command(DATA, "madpo show-data my.yaml -n 5", "docs/data.md")
def show_data(
    config: ConfigPath,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("-n", "--count", min=0, help="groups to show")] = 3,
    task: OfTask = None,
) -> None:
    """Show training data as the model sees it, and what was dropped."""
    resolved = loaded(config, overrides or [], task or "show-data")
    from rich.console import Console

    from madpo.launch.quiet import quiet_libraries

    quiet_libraries()
    from madpo.trainer.stages.show_data import show_data as show

    show(resolved, count, Console(highlight=False))


@command(DATA, "madpo check-data my.yaml", "docs/data.md")
def check_data(config: ConfigPath, overrides: Overrides = None, task: OfTask = None) -> None:
    """Check all data without a model: what is dropped, cut or odd.

    The exit status is 3 if there are rows that cannot be read.
    """
    resolved = loaded(config, overrides or [], task or "check-data")
    from rich.console import Console

    from madpo.launch.quiet import quiet_libraries

    quiet_libraries()
    from madpo.trainer.stages.check_data import check_data as check

    raise typer.Exit(check(resolved, Console(highlight=False)))


@command(DATA, "madpo prepare my.yaml", "docs/data.md")
def prepare(
    config: ConfigPath,
    overrides: Overrides = None,
    task: OfTask = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="read again what is in the cache, and compare checksums")
    ] = False,
) -> None:
    """Fetch models and tokenise data ahead of a run, without a GPU.

    A run of this config then starts at once, however many ranks it has.
    """
    resolved = loaded(config, overrides or [], task or "train")
    from madpo.launch.quiet import quiet_libraries

    quiet_libraries()
    from madpo.trainer.stages.prepare import prepare as run

    run(resolved, verify)
