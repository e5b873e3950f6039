"""The whole configuration: one strict schema, read from YAML with dotted overrides.

Key names are TRL's where TRL has one. An unknown key, a duplicate key or a value out of range is a
ValueError that names the key, the value and what is allowed, all of them at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from madpo.trainer import strict_yaml
from madpo.trainer.data.adapters import ADAPTERS
from madpo.trainer.data.rows import check_template_kwargs
from madpo.trainer.deepspeed_keys import DEEPSPEED_KEYS, OWNED_DEEPSPEED_KEYS
from madpo.trainer.errors import UserError
from madpo.trainer.generate_config import GenerateConfig
from madpo.trainer.objectives.base import Objective
from madpo.trainer.objectives.build import as_one_objective
from madpo.trainer.objectives.registry import OBJECTIVES, ObjectiveParams
from madpo.trainer.section import Section


class ModelConfig(Section):
    model_name_or_path: str | None = Field(
        default=None, description="weights to start from: folder or hub name"
    )
    model_revision: str | None = None
    init_config: dict[str, Any] | None = Field(
        default=None, description="build from scratch instead: `model_type` and that family's config values"
    )
    ref_model_name_or_path: str | None = Field(
        default=None, description="frozen reference; null is the model that training starts from"
    )
    sync_ref_model: bool = Field(default=False, description="move the reference towards the policy (TR-DPO)")
    ref_model_mixup_alpha: float = Field(default=0.6, gt=0, le=1, description="share of the policy in a move")
    ref_model_sync_steps: int = Field(default=512, ge=1, description="optimiser steps between moves")
    tokenizer_name_or_path: str | None = Field(default=None, description="null: beside the model")
    attention: Literal["sdpa", "flash"] = Field(
        default="sdpa", description="kernel of the packed attention; flash needs the flash-attn package"
    )
    gradient_checkpointing: bool = Field(default=False, description="recompute activations in backward")
    router_aux_loss_coef: float = Field(
        default=0.0, ge=0, description="weight of the load-balancing loss of mixtures of experts; 0: off"
    )
    resize_embeddings: bool = Field(
        default=False, description="give a model whose tokenizer is larger the rows that it lacks"
    )
    freeze: list[str] = Field(
        default_factory=list,
        description="weights that stay: `embeddings`, `head`, or patterns of names as in *.layers.0.*",
    )


class PeftConfig(Section):
    """A LoRA adapter in place of all weights. Null is the value in brackets, or what a stored adapter has."""

    lora_r: int | None = Field(default=None, ge=1, description="rank (16)")
    lora_alpha: int | None = Field(default=None, ge=1, description="scale: alpha / r, see use_rslora (32)")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="only 0")
    lora_target_modules: Literal["all-linear"] | list[str] | None = Field(
        default=None, description="names of linear layers (all-linear: all but the head)"
    )
    lora_modules_to_save: list[str] | None = Field(
        default=None, description="layers trained whole, in a copy, as in [embed_tokens, lm_head]"
    )
    use_rslora: bool | None = Field(default=None, description="scale: alpha / sqrt(r) (false)")
    use_dora: bool | None = Field(default=None, description="directions and magnitudes apart (false)")
    base_model_name_or_path: str | None = Field(
        default=None, description="of a stored adapter; null: the one that it names"
    )
    load_in_4bit: bool = Field(default=False, description="QLoRA: the base in 4 bits; needs madpo[qlora]")
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    use_bnb_nested_quant: bool = Field(default=False, description="quantise the quantisation constants too")

    @property
    def quantised(self) -> bool:
        return self.load_in_4bit or self.load_in_8bit

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.lora_dropout:
            raise UserError(
                f"lora_dropout: {self.lora_dropout} would be noise in the margin between policy and "
                "reference; only 0 is allowed. To regularise, lower lora_r or set optim.weight_decay"
            )
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError("load_in_4bit, load_in_8bit: set one of them")
        return self


class DataConfig(Section):
    dataset_name: str = Field(
        description="a .jsonl or .parquet file, a folder of <split>.jsonl/.parquet, or a hub name"
    )
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str | None = Field(default=None, description="held-out split; null: no evaluation")
    adapter: str = Field(default="auto", description="how rows are read, see docs/data.md; auto: by columns")
    columns: dict[str, str] = Field(default_factory=dict, description="our name of a column: the data set's")
    edges: Literal["all", "adjacent", "best_worst"] = Field(
        default="all", description="which completions of a ranked group are compared"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="variables for the chat template; a row's own come before these"
    )
    max_length: int = Field(default=1024, ge=2, description="tokens of prompt + one completion")
    append_eos: Literal["auto", "always", "never"] = Field(
        default="auto", description="auto: plain text yes, conversations no (their template ends them)"
    )
    order: Literal["shuffled", "easy_to_hard", "as_is"] = Field(
        default="shuffled", description="of every epoch; easy_to_hard: by falling margin"
    )
    on_bad_row: Literal["error", "drop"] = Field(default="error", description="a row that cannot be read")
    dataset_num_proc: int | None = Field(default=None, ge=1, description="processes that tokenise")
    cache_dir: str = Field(default="~/.cache/madpo", description="where tokenised data is kept")

    @field_validator("adapter")
    @classmethod
    def _known(cls, value: str) -> str:
        if value != "auto" and value not in ADAPTERS:
            raise UserError(f"unknown adapter{strict_yaml.nearest(value, ['auto', *ADAPTERS])}")
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _for_the_template(cls, value: dict[str, Any]) -> dict[str, Any]:
        return check_template_kwargs(value)


class OptimConfig(Section):
    lr: float = Field(default=1e-6, gt=0)
    weight_decay: float = Field(default=0.0, ge=0, description="on matrices only, not on norms and biases")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, ge=0, description="0: no clipping")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1, description="share of all steps; or warmup_steps")


class TrainConfig(Section):
    global_batch_size: int = Field(default=64, ge=1, description="groups (prompts) per step, over all ranks")
    micro_batch_tokens: int = Field(default=16384, ge=2, description="packed tokens per forward and rank")
    num_train_epochs: float = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1, description="in place of num_train_epochs")
    bf16: bool = True
    logging_steps: int = Field(default=10, ge=1)
    eval_steps: int | None = Field(default=None, ge=1, description="null: only at the end")
    save_steps: int | None = Field(default=None, ge=1, description="null: only at the end")
    save_total_limit: int = Field(default=2, ge=1, description="checkpoints kept")
    export: bool = Field(default=True, description="write a Hugging Face model folder at the end")
    export_merged: bool = Field(
        default=False, description="beside an adapter, also write whole weights with it in them"
    )
    max_shard_size: str = Field(
        default="5GB", pattern=r"^[1-9][0-9]*(KB|MB|GB)$", description="of an exported weights file"
    )
    head_gib: float = Field(default=2.0, gt=0, description="GiB of logits that the loss head keeps at once")
    head_impl: Literal["auto", "triton", "torch"] = Field(
        default="auto", description="of the loss head; auto: triton on GPUs, torch on CPUs"
    )


class LaunchConfig(Section):
    num_processes: int | Literal["auto"] = Field(
        default="auto", description="ranks on this machine; auto: one per GPU, without a GPU two"
    )
    timeout_minutes: float = Field(default=30.0, gt=0, description="a collective that hangs longer fails")

    @field_validator("num_processes")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise UserError("must be at least 1, or auto")
        return value


class Config(Section):
    output_dir: str = Field(description="the run folder")
    seed: int = Field(default=42, ge=0, lt=2**32)
    model: ModelConfig
    peft: PeftConfig | None = Field(default=None, description="null: train all weights")
    data: DataConfig
    objective: ObjectiveParams  # pyright: ignore[reportInvalidTypeForm]
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    launch: LaunchConfig = LaunchConfig()
    generate: GenerateConfig | None = Field(default=None, description="for madpo generate; null: defaults")
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="passed to DeepSpeed")

    @field_validator("objective", mode="before")
    @classmethod
    def _in_the_spelling_of_other_libraries(cls, value: Any) -> Any:
        return as_one_objective(value) if isinstance(value, dict) else value

    @property
    def objective_entry(self) -> Objective:
        return OBJECTIVES[self.objective.loss_type].of(self.objective)

    @model_validator(mode="after")
    def _validate(self) -> Self:
        validate(self)
        return self


def validate(config: Config) -> None:
    """The checks that look at more than one key. Raises ValueError."""
    model, optim, train = config.model, config.optim, config.train
    if (model.model_name_or_path is None) == (model.init_config is None):
        raise UserError("model: set one of model_name_or_path (weights) and init_config (from scratch)")
    if model.init_config is not None:
        if "model_type" not in model.init_config:
            raise UserError("model.init_config: model_type is missing, for example llama")
        if model.tokenizer_name_or_path is None:
            raise UserError("model.tokenizer_name_or_path: a model from scratch needs a tokenizer")
        if config.objective_entry.needs_reference and model.ref_model_name_or_path is None:
            raise UserError(
                f"model.ref_model_name_or_path: {config.objective.loss_type} needs a reference, and a "
                "model from scratch is none; name a trained model, or train with loss_type nll first"
            )
    if model.ref_model_name_or_path is not None and not config.objective_entry.needs_reference:
        raise UserError(f"model.ref_model_name_or_path: {config.objective.loss_type} uses no reference")
    if model.sync_ref_model and not config.objective_entry.needs_reference:
        raise UserError(f"model.sync_ref_model: {config.objective.loss_type} uses no reference")
    if model.attention == "flash" and not train.bf16:
        raise UserError("model.attention: flash computes in bf16; set train.bf16=true or attention=sdpa")
    if model.router_aux_loss_coef and "scores" in config.objective_entry.needs:
        raise UserError("model.router_aux_loss_coef: it is not computed for reward models; set it to 0")
    if config.data.dataset_test_split == config.data.dataset_train_split:
        raise UserError("data.dataset_test_split: it is the training split; held-out data must be other data")
    if train.eval_steps is not None and config.data.dataset_test_split is None:
        raise UserError("train.eval_steps: there is nothing to evaluate on; set data.dataset_test_split")
    if optim.warmup_steps and optim.warmup_ratio:
        raise UserError("optim: set warmup_steps or warmup_ratio, not both")
    completions = 1 if config.objective_entry.supervised else 2
    if train.micro_batch_tokens < completions * config.data.max_length:
        raise UserError(
            f"train.micro_batch_tokens: {train.micro_batch_tokens} cannot hold one group of {completions} "
            f"completion(s) of data.max_length {config.data.max_length}; set it to at least "
            f"{completions * config.data.max_length}"
        )
    for key in config.deepspeed:
        if key in OWNED_DEEPSPEED_KEYS:
            raise UserError(f"deepspeed.{key}: madpo sets this itself; use {OWNED_DEEPSPEED_KEYS[key]}")
        if key not in DEEPSPEED_KEYS:
            allowed = DEEPSPEED_KEYS - OWNED_DEEPSPEED_KEYS.keys()
            raise UserError(f"deepspeed.{key}: unknown key{strict_yaml.nearest(key, allowed)}")
    zero = config.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 3) not in (1, 2, 3):
        raise UserError(f"deepspeed.zero_optimization: a mapping with stage 1, 2 or 3, got {zero!r}")
    if config.peft is not None:
        validate_peft(config, config.peft)


def validate_peft(config: Config, peft: PeftConfig) -> None:
    """What an adapter, a new one or a stored one, cannot be combined with. Raises ValueError."""
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
    stage = config.deepspeed.get("zero_optimization", {}).get("stage", 3)
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


DEFAULT_OBJECTIVES = {"sft": "nll", "reward": "bradley_terry", "annotate": "bradley_terry", "generate": "nll"}
"""Task -> the loss_type of a config that names none; `generate` has no use for it."""


def load(path: str | Path, overrides: Iterable[str] = (), task: str = "train") -> Config:
    """Read a YAML file, apply `section.key=value` overrides, check everything. Raises ValueError."""
    return from_tree(strict_yaml.override(strict_yaml.read(path), overrides), str(path), task)


def from_tree(tree: dict[str, Any], origin: str, task: str = "train") -> Config:
    """The config in a mapping of sections, for a task. ValueError names `origin` and every problem."""
    objective = tree.get("objective") or {}
    if task in DEFAULT_OBJECTIVES and isinstance(objective, dict):
        tree = {**tree, "objective": {"loss_type": DEFAULT_OBJECTIVES[task], **objective}}
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{origin}: {_explain(error)}") from None
    kinds = {"sft": config.objective_entry.supervised, "reward": "scores" in config.objective_entry.needs}
    if not kinds.get(task, True):
        raise UserError(
            f"{origin}: objective.loss_type: {config.objective.loss_type} is no objective of madpo {task}, "
            f"which takes {DEFAULT_OBJECTIVES[task]} or one of its kind; leave it out, or use madpo train"
        )
    return config


def dump(config: Config) -> str:
    """The resolved config as YAML; `load` of it gives the same config."""
    return strict_yaml.dump(config.model_dump(mode="json", by_alias=True))


def _explain(error: ValidationError) -> str:
    """Every problem on its own line: key, what is wrong, what is allowed."""
    lines = [_explain_one(item) for item in error.errors()]
    return lines[0] if len(lines) == 1 else f"{len(lines)} problems\n" + "\n".join(f"  {x}" for x in lines)


def _explain_one(item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    if location[:1] == ["objective"] and location[1:2] and location[1] in OBJECTIVES:
        del location[1]  # pydantic names the chosen parameter class in the path
    key, kind, value = ".".join(location), item["type"], item["input"]
    prefix = f"{key}: " if key else ""
    if kind == "extra_forbidden":
        return f"{prefix}unknown key{strict_yaml.nearest(location[-1], _known_keys(item['loc']))}"
    if kind == "missing":
        return f"{prefix}is required"
    if kind == "union_tag_not_found":
        return f"{prefix}loss_type is required; one of {', '.join(OBJECTIVES)}"
    if kind == "union_tag_invalid":
        tag = str(item["ctx"]["tag"])
        return f"objective.loss_type: unknown objective {tag!r}{strict_yaml.nearest(tag, OBJECTIVES)}"
    if kind == "value_error" and (not key or isinstance(value, dict | BaseModel)):
        return prefix + item["msg"].removeprefix("Value error, ")
    return f"{prefix}{item['msg'].removeprefix('Value error, ')} (got {value!r})"


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """The keys that are allowed where `location` points to an unknown one."""
    node: type[BaseModel] = Config
    parents = list(location[:-1])
    if parents[:1] == ["objective"]:
        node = OBJECTIVES[str(parents[1])].params
    else:
        for parent in parents:
            annotation = node.model_fields[str(parent)].annotation
            kinds = (annotation, *get_args(annotation))  # a section may be null
            node = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return [field.serialization_alias or name for name, field in node.model_fields.items()]
