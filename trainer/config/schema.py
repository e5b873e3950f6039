"""The whole configuration: one strict schema, read from YAML with dotted overrides.

Key names are TRL's where TRL has one. Unknown keys, duplicate keys and values out of range are a UserError
that names each key, its value and what is allowed, all at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from madpo.trainer.config import strict_yaml
from madpo.trainer.config.data import DataConfig
from madpo.trainer.config.deepspeed import check_block, zero_stage
from madpo.trainer.config.defaults import with_defaults
from madpo.trainer.config.error_text import explain
from madpo.trainer.config.generate import GenerateConfig
from madpo.trainer.config.model import ModelConfig
from madpo.trainer.config.peft import PeftConfig
from madpo.trainer.config.run_config import as_block, read_tree, with_objective_of_run
from madpo.trainer.config.section import Effect, FolderName, Section, setting
from madpo.trainer.config.train import NOTHING_TO_EVALUATE, OptimConfig, TrainConfig
from madpo.trainer.counted import counted
from madpo.trainer.errors import UserError
from madpo.trainer.masking import masked, masked_keys
from madpo.trainer.objectives.base import Need
from madpo.trainer.objectives.build import BoundObjective, as_one_objective, bind
from madpo.trainer.objectives.registry import ObjectiveParams


class AnnotateConfig(Section):
    """The reward models that `madpo annotate` scores with, instead of the run in output_dir."""

    folds: int | None = Field(
        default=None,
        ge=2,
        description="number of models to train, each without one fold of the prompts (cross-fitting)",
    )
    models: list[str] | None = setting(
        default=None,
        min_length=1,
        description="reward models, or run folders of such, whose mean score is written",
        effect=Effect.RESULT,
        names="path",
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.folds is not None and self.models is not None:
            raise UserError("set folds (models to train) or models (that are there), not both")
        return self


class LaunchConfig(Section):
    num_processes: Annotated[int, Field(ge=1)] | Literal["auto"] = setting(
        default="auto",
        description="ranks on this machine; auto: one per GPU, or two without a GPU",
        effect=Effect.RESULT,
    )
    start_timeout_minutes: float = setting(
        default=5.0, gt=0, description="minutes that ranks wait for each other to start", effect=Effect.MEANS
    )
    timeout_minutes: float = setting(
        default=30.0, gt=0, description="minutes after which a hanging collective fails", effect=Effect.MEANS
    )


class Config(Section):
    output_dir: FolderName = setting(
        description="folder of the run: checkpoints, metrics, report, model", effect=Effect.MEANS
    )
    seed: int = Field(
        default=42,
        ge=0,
        lt=2**32,
        description="seed of new weights, of the order of the data, and of sampling",
    )
    model: ModelConfig = Field(description="weights, reference, attention, what is frozen")
    peft: PeftConfig | None = Field(default=None, description="LoRA adapter; null: train all weights")
    data: DataConfig = Field(description="data sets, how they are read, and what becomes of them")
    objective: ObjectiveParams = Field(description="loss_type and its parameters; `madpo keys` lists them")  # pyright: ignore[reportInvalidTypeForm]
    optim: OptimConfig = Field(default=OptimConfig(), description="optimiser and learning rate")
    train: TrainConfig = Field(default=TrainConfig(), description="batch sizes, length, logs, checkpoints")
    annotate: AnnotateConfig = setting(
        AnnotateConfig(), description="models that madpo annotate scores with", effect=Effect.RESULT
    )
    launch: LaunchConfig = Field(default=LaunchConfig(), description="ranks on this machine")
    generate: GenerateConfig | None = setting(
        default=None,
        description="what madpo generate samples and who judges it; null: defaults",
        effect=Effect.RESULT,
    )
    deepspeed: dict[str, Any] = setting(
        default_factory=dict,
        description="DeepSpeed's own keys, as in {zero_optimization: {stage: 2}}",
        effect=Effect.RESULT,
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_its_kind(cls, tree: Any) -> Any:
        return with_defaults(tree) if isinstance(tree, dict) else tree

    @field_validator("output_dir")
    @classmethod
    def _names_a_folder(cls, value: str) -> str:
        if not value.strip() or "\0" in value:
            raise UserError("names no folder")
        return os.path.expanduser(value)

    @field_validator("objective", mode="before")
    @classmethod
    def _in_the_spelling_of_other_libraries(cls, value: Any) -> Any:
        block = as_block(value)
        return as_one_objective(block) if isinstance(block, dict) else block

    @property
    def bound_objective(self) -> BoundObjective:
        """The objective with its parameters."""
        return bind(self.objective)

    @model_validator(mode="after")
    def _validate(self) -> Self:
        validate(self)
        return self


def validate(config: Config) -> None:
    """Check combinations of keys. Raises UserError."""
    model, optim, train = config.model, config.optim, config.train
    if (model.model_name_or_path is None) == (model.init_config is None):
        raise UserError("model: set one of model_name_or_path (weights) and init_config (from scratch)")
    if model.init_config is not None:
        if "model_type" not in model.init_config:
            raise UserError("model.init_config: model_type is missing, for example llama")
        if model.tokenizer_name_or_path is None:
            raise UserError("model.tokenizer_name_or_path: a model from scratch needs a tokenizer")
        if config.bound_objective.needs_reference and model.ref_model_name_or_path is None:
            raise UserError(
                f"model.ref_model_name_or_path: {config.objective.loss_type} needs a reference, and a "
                "model from scratch is none; name a trained model, or train with loss_type nll first"
            )
    _validate_reference(config)
    if model.ref_model_name_or_path is not None and not config.bound_objective.needs_reference:
        raise UserError(f"model.ref_model_name_or_path: {config.objective.loss_type} uses no reference")
    if model.sync_ref_model and not config.bound_objective.needs_reference:
        raise UserError(f"model.sync_ref_model: {config.objective.loss_type} uses no reference")
    if model.attention in ("flash", "torch") and not train.bf16:
        raise UserError(
            f"model.attention: {model.attention} computes in bf16; set train.bf16=true or attention=auto"
        )
    if model.router_aux_loss_coef and config.bound_objective.is_reward_model:
        raise UserError("model.router_aux_loss_coef: it is not computed for reward models; set it to 0")
    _validate_sequence_parallel(config)
    _validate_data(config)
    _validate_weights(config)
    if config.data.streaming:
        _validate_streaming(config)
    if config.annotate.folds is not None and config.data.folds is not None:
        raise UserError("data.folds: annotate.folds sets it for every model; remove it")
    if train.eval_steps is not None and not config.data.may_hold_out:
        raise UserError(NOTHING_TO_EVALUATE)
    if optim.warmup_steps and optim.warmup_ratio:
        raise UserError("optim: set warmup_steps or warmup_ratio, not both")
    completions = 1 if config.bound_objective.supervised else 2
    if train.row_tokens < completions * config.data.max_length:
        sharing = train.sequence_parallel_size
        raise UserError(
            f"train.micro_batch_tokens: {train.micro_batch_tokens} cannot hold one group of "
            f"{counted(completions, 'completion')} of data.max_length {config.data.max_length}"
            f"{f', with {sharing} ranks to a row' if sharing > 1 else ''}; set it to at least "
            f"{-(-completions * config.data.max_length // sharing)}"
        )
    check_block(config.deepspeed)
    if config.peft is not None:
        validate_peft(config, config.peft)


def _validate_sequence_parallel(config: Config) -> None:
    if config.train.sequence_parallel_size == 1:
        return
    if config.bound_objective.is_reward_model:
        raise UserError("train.sequence_parallel_size: reward models are not trained in slices; set it to 1")
    if config.model.router_aux_loss_coef:
        raise UserError(
            "model.router_aux_loss_coef: it is a loss of whole rows, which with train.sequence_parallel_size "
            "no rank has; leave one of the two out"
        )


def validate_peft(config: Config, peft: PeftConfig) -> None:
    """Check what an adapter, new or stored, cannot be combined with. Raises UserError."""
    model = config.model
    if model.init_config is not None:
        raise UserError(
            "peft: an adapter needs weights that it can be put on again; set model.model_name_or_path"
        )
    if model.sync_ref_model:
        raise UserError(
            "model.sync_ref_model: the reference of an adapter is its own base model, which does not move; "
            "train all weights (without peft), or set sync_ref_model=false"
        )
    if model.freeze:
        raise UserError("model.freeze: with peft nothing but the adapter is trained; leave freeze out")
    if peft.quantised and not config.train.bf16:
        raise UserError("peft.load_in_4bit, load_in_8bit: they compute in bf16; set train.bf16=true")
    stage = zero_stage(config.deepspeed, int(os.environ.get("WORLD_SIZE", "1")))
    if stage == 3 and (peft.quantised or peft.use_dora):
        key = "use_dora" if peft.use_dora else "load_in_4bit, load_in_8bit"
        raise UserError(
            f"peft.{key}: such a layer needs more in one piece than the weight that ZeRO-3 gathers for it; "
            "set deepspeed.zero_optimization.stage=2"
        )
    if peft.quantised and config.train.export_merged:
        raise UserError(
            "train.export_merged: the base is quantised; export the adapter, and merge it with peft into the "
            "weights as they were before"
        )


def _validate_reference(config: Config) -> None:
    model, entry, name = config.model, config.bound_objective, config.objective.loss_type
    if model.reference == "auto":
        return
    if model.reference == "none" and entry.needs_reference:
        raise UserError(f"model.reference: none, but {name} compares with a reference; set auto")
    if model.reference != "none" and not entry.needs_reference:
        raise UserError(f"model.reference: {model.reference}, but {name} uses no reference; set auto or none")
    if model.reference == "adapter" and model.ref_model_name_or_path is not None:
        raise UserError(
            "model.reference: adapter is the policy without its adapter, and model.ref_model_name_or_path "
            "names a model; leave the name out, or set joint or cached"
        )
    if model.reference != "cached":
        return
    if model.sync_ref_model:
        raise UserError(
            "model.reference: cached log-probs are of a reference that stays; set joint, or "
            "sync_ref_model=false"
        )
    if config.data.streaming:
        raise UserError(
            "model.reference: cached needs the whole set before training, which a stream never "
            "has; set auto, or data.streaming=false"
        )
    if Need.KL in entry.needs:
        raise UserError(
            f"model.reference: cached keeps the log-prob of each completion token, and {name} "
            "looks at the reference's whole distribution; set auto"
        )


def _validate_data(config: Config) -> None:
    data = config.data
    if data.dataset_name is None and data.datasets is None:
        raise UserError("data.dataset_name: is required, or data.datasets for a mixture")
    if data.dataset_name is not None and data.datasets is not None:
        raise UserError("data: set one of dataset_name (a single data set) and datasets (a mixture)")
    if data.dataset_test_split == data.dataset_train_split:
        raise UserError("data.dataset_test_split: it is the training split; held-out data must be other data")
    for number, part in enumerate(data.datasets or []):
        if part.test_split == part.split:
            raise UserError(
                f"data.datasets.{number}.test_split: it is the training split; held-out data must be "
                "other data"
            )
    keys_of_parts = {
        "dataset_config": "name",
        "dataset_train_split": "split",
        "dataset_test_split": "test_split",
    }
    for key, key_of_part in keys_of_parts.items():
        if data.datasets is not None and getattr(data, key) != DataConfig.model_fields[key].default:
            raise UserError(
                f"data.{key}: every part of a mixture has its own; "
                f"set data.datasets: [{{{key_of_part}: ...}}]"
            )


def _validate_weights(config: Config) -> None:
    """Check the two keys that look at weights, `min_weight` and `sampling`."""
    data = config.data
    if data.min_weight is not None:
        key = "min_weight"
    elif data.sampling == "weight":
        key = "sampling"
    else:
        return
    if data.streaming:
        raise UserError(
            f"data.{key}: it looks at the weights of the whole set, which a stream never has; leave it out"
        )
    if data.sampling == "weight" and config.bound_objective.needs_batch:
        raise UserError(
            f"data.sampling: {config.objective.loss_type} looks at all completions of a step together, and "
            "drawn ones are not those of the data; set uniform, and weights multiply the losses"
        )
    if data.sampling == "weight" and data.order != "shuffled":
        raise UserError(f"data.sampling: weight draws at random; set data.order=shuffled, not {data.order}")


def _validate_streaming(config: Config) -> None:
    data = config.data
    if config.train.max_steps is None:
        raise UserError("train.max_steps: set it; how long an epoch of a stream is shows only at its end")
    if data.datasets is not None:
        raise UserError("data.streaming: of one data set only; write the mixture into a file")
    if data.folds is not None:
        raise UserError("data.folds: a stream is not parted; write the folds into files, or do not stream")
    if data.order == "easy_to_hard":
        raise UserError(
            "data.order: easy_to_hard sorts the whole set, which a stream never has; write the rows in "
            "that order and set as_is"
        )
    if config.objective.quantiles:
        raise UserError(
            f"objective.{next(iter(config.objective.quantiles))}: a quantile is one of the whole set, which "
            "a stream never has; give the number"
        )
    if data.dataset_num_proc is not None:
        raise UserError("data.dataset_num_proc: a stream tokenises in one process, in the background; null")


DEFAULT_OBJECTIVES = {
    "sft": "nll",
    "reward": "bradley_terry",
    "annotate": "bradley_terry",
    "generate": "nll",
    "probe": "nll",
}
"""Task -> the loss_type of a config that names none. `generate` uses no loss, and `probe` one of its own."""

OF_ANY_TASK = {"config", "show-data", "check-data", "evaluate", "export"}
"""Commands that take the config of any run. Where it names no loss_type, it is the run's."""


MAY_BE_MASKED = ("generate.", "deepspeed.")
"""Where a masked value does no harm: a judge asks for its own before it is used, and DeepSpeed needs none."""


def load(path: str | Path, overrides: Iterable[str] = (), task: str = "train") -> Config:
    """Read a config, apply `section.key=value` overrides, check it. Raises UserError.

    `path` is a YAML file, or the folder of a run, which stands for its config.yaml. `task` is a command; it
    decides the objective of a config that names none.
    """
    overrides = list(overrides)
    tree = strict_yaml.override(read_tree(path), overrides)
    if task in OF_ANY_TASK:
        tree = with_objective_of_run(tree)
    return from_tree(tree, f"{path} and the command line" if overrides else str(path), task)


def from_tree(tree: dict[str, Any], origin: str, task: str = "train") -> Config:
    """Build and check a task's config from a mapping. UserError names `origin` and every problem."""
    if lost := [key for key in masked_keys(tree) if not key.startswith(MAY_BE_MASKED)]:
        raise UserError(f"{origin}: {lost[0]}: was masked when this file was written; give it again")
    objective = as_block(tree.get("objective"))
    if task in DEFAULT_OBJECTIVES and isinstance(objective, dict):
        tree = {**tree, "objective": {"loss_type": DEFAULT_OBJECTIVES[task], **objective}}
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{origin}: {explain(error, Config)}") from None
    kinds = {"sft": config.bound_objective.supervised, "reward": config.bound_objective.is_reward_model}
    if not kinds.get(task, True):
        raise UserError(
            f"{origin}: objective.loss_type: {config.objective.loss_type} is no objective of madpo {task}, "
            f"which takes {DEFAULT_OBJECTIVES[task]} or one of its kind; leave it out, or use madpo train"
        )
    return config


def dump(config: Config) -> str:
    """The resolved config as YAML, with secrets masked. `load` reads it back as an equal config, but for
    those."""
    return strict_yaml.dump(masked(config.model_dump(mode="json", by_alias=True)))
