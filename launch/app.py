"""The command line's frame: the app, arguments that several commands share, and how a command is registered.

Heavy imports live inside the functions, so that --help answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from madpo.launch.console_log import outlive_readers
from madpo.launch.help import FIRST_STEPS, NAMES, ConfigCommand, complete_config, guide, show_versions

if TYPE_CHECKING:
    from madpo.launch.local import Task
    from madpo.trainer.config.schema import Config

Function = TypeVar("Function", bound=Callable[..., Any])

app = typer.Typer(
    help="Train language models on preferences with ZeRO-3: MADPO, DPO and more.",
    epilog=FIRST_STEPS,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=NAMES,
)


def command(group: str, example: str, page: str, name: str | None = None) -> Callable[[Function], Function]:
    """Register a command in a group of the help, with an example and the page that says more."""
    return app.command(name, cls=ConfigCommand, rich_help_panel=group, epilog=guide(example, page))


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", help="show versions", callback=show_versions, is_eager=True)
    ] = False,
) -> None:
    pass


ConfigPath = Annotated[
    str,
    typer.Argument(help="YAML file, or a run folder", metavar="CONFIG", autocompletion=complete_config),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="values in place of the config's, as in optim.lr=2e-6", metavar="SECTION.KEY=VALUE"),
]
OfTask = Annotated[
    Literal["train", "sft", "reward"] | None,
    typer.Option("--task", help="read the config as that command does"),
]
AnyTask = Annotated[
    Literal["train", "sft", "reward", "evaluate", "export", "probe", "annotate", "generate"],
    typer.Option("--task", help="what the job does"),
]
Extend = Annotated[
    bool, typer.Option("--extend", help="continue a finished run to more train.max_steps or num_train_epochs")
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="move an earlier run in output_dir aside and start anew")
]


def run_task(task: Task, config: str, overrides: list[str] | None, flags: Sequence[str] = ()) -> None:
    outlive_readers()
    resolved = loaded(config, overrides or [], task)
    from madpo.launch import local
    from madpo.launch.preflight import check

    check(resolved, task, base=bool(flags))
    raise typer.Exit(local.run(task, config, overrides or [], resolved, flags))


def loaded(config: str, overrides: list[str], task: str) -> Config:
    """Load a config. That takes seconds, most of them torch's import, so something is said first."""
    print(f"reading {config}", flush=True)
    from madpo.trainer.config.schema import load

    return load(config, overrides, task)
