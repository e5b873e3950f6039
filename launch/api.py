"""Training, evaluation and sampling from Python: what `madpo.train` and its siblings do.

Each runs in the calling process: alone in a script or a notebook, or as one of the ranks that torchrun or
deepspeed started. `config` is a path, a mapping with a YAML file's sections, or a `Config`.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from madpo.launch import local
from madpo.trainer.config import strict_yaml
from madpo.trainer.config.data import DataConfig
from madpo.trainer.config.run_config import read_tree
from madpo.trainer.config.schema import Config, from_tree
from madpo.trainer.errors import UserError

if TYPE_CHECKING:
    from madpo.trainer.data.in_memory import Rows
    from madpo.trainer.stages.train import Callback

__all__ = ["Config", "TrainResult", "UserError", "evaluate", "generate", "load_config", "train"]

Source = str | os.PathLike[str] | Mapping[str, Any] | Config
Task = Literal["train", "sft", "reward", "evaluate", "generate"]


@dataclass(frozen=True)
class TrainResult:
    """What a training run has left behind."""

    output_dir: Path
    history: list[dict[str, Any]]
    """Every logged record from the run's first step on, evaluations too: the lines of metrics.jsonl."""
    evaluation: dict[str, Any] | None
    """The last record with held-out metrics (`eval_...`); None if nothing was evaluated."""
    model: Path | None
    """The exported model; None with `train.export: false`."""
    report: Path | None
    """The HTML report; None if it could not be drawn."""


def load_config(config: Source, overrides: Mapping[str, Any] | None = None, task: Task = "train") -> Config:
    """Read and check a config. `overrides` (dotted key -> value) replace what it says.

    Raises UserError that names every key that is wrong.
    """
    if isinstance(config, Config) and not overrides:
        return config
    tree, origin = _tree_of(config)
    texts = [f"{key}={json.dumps(value, default=os.fspath)}" for key, value in (overrides or {}).items()]
    return from_tree(strict_yaml.override(tree, texts), origin, task)


def train(
    config: Source,
    *,
    train: Rows | None = None,
    evaluation: Rows | None = None,
    callbacks: Sequence[Callback] = (),
    task: Literal["train", "sft", "reward"] = "train",
    fresh: bool = False,
    extend: bool = False,
) -> TrainResult:
    """Train as `madpo train` does, or `madpo sft` or `madpo reward`; continue a run that was cut off.

    `train` and `evaluation` are data sets in memory, in place of those that the config names. Each callback
    is called with every logged record, on rank 0. `fresh` renames an earlier run in `output_dir` first;
    `extend` lets one go on to another length than it had.

    Returns the same on all ranks. Raises UserError for a config, model or data set that cannot be trained,
    and what a callback raises, which stops the run.
    """
    if task not in ("train", "sft", "reward"):
        raise UserError(f"task: train, sft or reward, got {task!r}; objective.loss_type names the loss")
    if train is None and evaluation is not None:
        raise UserError("evaluation: the config names the training data; give train=... too, or neither")
    given = {"train": train, "evaluation": evaluation}
    with _data_of(config, task, given) as resolved, _ranks(resolved, task) as is_main:
        from madpo.trainer.run_folder import set_aside
        from madpo.trainer.stages.train import run_training

        if fresh and is_main:
            set_aside(Path(resolved.output_dir))
        run_training(resolved, f"madpo.train in {_script()}", callbacks, extend)
        return _result(resolved, is_main)


def evaluate(config: Source, *, evaluation: Rows | None = None, base: bool = False) -> dict[str, Any]:
    """Evaluate the newest checkpoint in `output_dir`, or with `base` the model that training starts from.

    `evaluation` is a data set in memory, in place of the config's held-out split. Returns, on all ranks,
    `model` (the checkpoint or the starting model's name) and the metrics (`eval_...`), as in
    evaluation.json. Raises UserError.
    """
    with _data_of(config, "evaluate", {"evaluation": evaluation}) as resolved, _ranks(resolved, "evaluate"):
        from madpo.trainer.stages.evaluate import run_evaluation

        return run_evaluation(resolved, base)


def generate(
    config: Source, *, prompts: Sequence[Any] | Rows | None = None, models: Sequence[str | Path] = ()
) -> list[dict[str, Any]]:
    """Sample completions as `madpo generate` does, with the config's section `generate`.

    `prompts` are texts, conversations (lists of messages), or rows with a column `prompt`, in place of the
    config's data set; equal ones are sampled once. `models` are folders of models or of runs, or names on
    the hub, in place of `generate.models`. Returns, on all ranks, a record for each prompt: `prompt`,
    `completions`, `models` (of each completion), `finish`, `tokens`, and `scores` if there is a judge.
    Raises UserError.
    """
    rows: Any = prompts
    if isinstance(prompts, Sequence) and not isinstance(prompts, str):
        rows = [row if isinstance(row, Mapping) else {"prompt": row} for row in prompts]
    values = {"generate.models": [str(model) for model in models]} if models else {}
    with _data_of(config, "generate", {"prompts": rows}, values) as resolved, _ranks(resolved, "generate"):
        from madpo.trainer.data.source import test_split
        from madpo.trainer.stages.generate import run_generation

        run_generation(resolved)
        data, folder = resolved.data, Path(resolved.output_dir) / "generated"
        splits = [split for split in (data.dataset_train_split, test_split(data)) if split]
        files = [folder / f"{split}.jsonl" for split in splits]
        return [json.loads(line) for file in files for line in file.read_bytes().splitlines()]


@contextmanager
def _data_of(
    config: Source,
    task: Task,
    given: Mapping[str, Rows | None],
    values: Mapping[str, Any] | None = None,
) -> Iterator[Config]:
    """The config with the data sets that were given in memory, and with these values.

    Inside, errors about a row name it by its place in memory.
    """
    from madpo.trainer.data.in_memory import named_as_given, write_splits

    values, splits = dict(values or {}), {name: rows for name, rows in given.items() if rows is not None}
    if not splits:
        yield load_config(config, values, task)
        return
    tree, _ = _tree_of(config)
    section = tree.get("data") or {}
    held_out = section.get("dataset_test_split")
    if held_out not in (None, "auto") and "evaluation" in given.keys() - splits.keys():
        raise UserError(
            f"evaluation: the config names {held_out!r} of its own data set as data.dataset_test_split; give "
            "evaluation=... too, or set data.dataset_test_split to null"
        )
    files = write_splits(splits, Path(section.get("cache_dir", DataConfig.model_fields["cache_dir"].default)))
    values |= {
        "data.dataset_name": next(iter(files.values())).parent,
        "data.dataset_train_split": next((name for name in splits if name != "evaluation"), "train"),
        "data.dataset_test_split": "evaluation" if "evaluation" in splits else None,
        "data.datasets": None,
        "data.dataset_config": None,
    }
    with named_as_given(files):
        yield load_config(config, values, task)


def _tree_of(config: Source) -> tuple[dict[str, Any], str]:
    """The config as a mapping of sections, and how messages name it."""
    if isinstance(config, Config):
        return config.model_dump(mode="json", by_alias=True), "config"
    if isinstance(config, Mapping):
        return _with_text_for_paths(config), "config"
    return read_tree(config), str(config)


def _with_text_for_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_text_for_paths(child) for key, child in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else value


@contextmanager
def _ranks(config: Config, task: Task) -> Iterator[bool]:
    """Join the ranks that a launcher started; yields whether this is rank 0.

    Without a launcher this process runs alone, and neither process group nor environment variables stay.
    Under one the group stays until the process ends: torchrun's store cannot be joined twice.
    """
    from torch import distributed

    from madpo.launch.environment import join_launcher
    from madpo.trainer import disk_faults, dist, out_of_memory
    from madpo.trainer.config.deepspeed import check_machine

    join_launcher()
    with ExitStack() as cleanup:
        cleanup.enter_context(out_of_memory.explained(config, task))
        cleanup.enter_context(disk_faults.explained(config))
        cleanup.enter_context(warnings.catch_warnings())
        # torch 2.13 warns at every collective about a renamed argument that DeepSpeed still uses.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        if not distributed.is_initialized():
            if "RANK" in os.environ:
                atexit.register(dist.leave)
            else:
                _say_that_it_runs_alone(config)
                cleanup.enter_context(_environment(local.environment(1, dist.free_port())))
                cleanup.callback(dist.leave)
        check_machine(config.deepspeed)
        # The stages join the group themselves, after they have read the data.
        yield (distributed.get_rank() if distributed.is_initialized() else int(os.environ["RANK"])) == 0


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, and undo that."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _say_that_it_runs_alone(config: Config) -> None:
    """Say how to use the other ranks or GPUs that this machine or the config has, if any."""
    import torch

    wanted = config.launch.num_processes
    ranks = torch.cuda.device_count() if wanted == "auto" else wanted
    if ranks > 1:
        print(
            f"madpo runs in this process alone; for {ranks} ranks: torchrun --nproc-per-node {ranks} SCRIPT",
            flush=True,
        )


def _result(config: Config, is_main: bool) -> TrainResult:
    from madpo.trainer.dist import barrier
    from madpo.trainer.reports.run_report import write_report
    from madpo.trainer.run_folder import read_metrics

    folder = Path(config.output_dir)
    history, report = read_metrics(folder), folder / "report.html"
    if is_main:
        try:
            write_report([folder], report)
        except UserError as error:
            print(f"no report: {error}", file=sys.stderr)
    barrier()
    return TrainResult(
        output_dir=folder,
        history=history,
        evaluation=next((record for record in reversed(history) if "eval_loss" in record), None),
        model=folder / "model" if config.train.export else None,
        report=report if report.is_file() else None,
    )


def _script() -> str:
    return sys.argv[0] or "an interactive session"
