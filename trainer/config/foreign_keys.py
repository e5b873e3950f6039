"""Key names of TRL, LLaMA-Factory, Axolotl and OpenRLHF, and what they are here.

Read where an unknown key is explained, and by `madpo convert`. Names that are the same here are not listed:
they are found in the schema.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel

RENAMED = {
    # transformers' TrainingArguments, and TRL's configs
    "learning_rate": "optim.lr",
    "zero_optimization": "deepspeed.zero_optimization",
    "model_name": "model.model_name_or_path",
    "ref_model": "model.ref_model_name_or_path",
    "tokenizer_name": "model.tokenizer_name_or_path",
    "attn_implementation": "model.attention",
    "precompute_ref_log_probs": "model.reference",
    "max_seq_length": "data.max_length",
    "dataset_streaming": "data.streaming",
    "preprocessing_num_workers": "data.dataset_num_proc",
    "ddp_timeout": "launch.timeout_minutes",
    "loss_type": "objective.loss_type",
    "loss_weights": "objective.loss_weights",
    "beta": "objective.beta",
    "label_smoothing": "objective.label_smoothing",
    "desirable_weight": "objective.desirable_weight",
    "undesirable_weight": "objective.undesirable_weight",
    "center_rewards_coefficient": "objective.center_rewards_coefficient",
    "simpo_gamma": "objective.gamma",
    "cpo_alpha": "objective.alpha",
    "rpo_alpha": "objective.alpha",
    "ld_alpha": "objective.alpha",
    "f_divergence_type": "objective.divergence",
    "discopop_tau": "objective.tau",
    # LLaMA-Factory
    "cutoff_len": "data.max_length",
    "dataset": "data.dataset_name",
    "pref_beta": "objective.beta",
    "pref_loss": "objective.loss_type",
    "pref_ftx": "objective.alpha",
    "dpo_label_smoothing": "objective.label_smoothing",
    "kto_chosen_weight": "objective.desirable_weight",
    "kto_rejected_weight": "objective.undesirable_weight",
    "lora_rank": "peft.lora_r",
    "lora_target": "peft.lora_target_modules",
    "additional_target": "peft.lora_modules_to_save",
    "resize_vocab": "model.resize_embeddings",
    "enable_liger_kernel": "model.use_liger_kernel",
    "moe_aux_loss_coef": "model.router_aux_loss_coef",
    "flash_attn": "model.attention",
    # Axolotl
    "base_model": "model.model_name_or_path",
    "revision_of_model": "model.model_revision",
    "tokenizer_config": "model.tokenizer_name_or_path",
    "sequence_len": "data.max_length",
    "num_epochs": "train.num_train_epochs",
    "lr_scheduler": "optim.lr_scheduler_type",
    "rl": "objective.loss_type",
    "rl_beta": "objective.beta",
    "orpo_alpha": "objective.lambda",
    "kto_desirable_weight": "objective.desirable_weight",
    "kto_undesirable_weight": "objective.undesirable_weight",
    "lora_target_linear": "peft.lora_target_modules",
    "peft_use_dora": "peft.use_dora",
    "peft_use_rslora": "peft.use_rslora",
    "flash_attention": "model.attention",
    "context_parallel_size": "train.sequence_parallel_size",
    # OpenRLHF
    "pretrain": "model.model_name_or_path",
    "save_path": "output_dir",
    "max_len": "data.max_length",
    "max_epochs": "train.num_train_epochs",
    "train_batch_size": "train.global_batch_size",
    "adam_betas": "optim.adam_beta1 and optim.adam_beta2",
    "l2": "optim.weight_decay",
    "max_norm": "optim.max_grad_norm",
    "zero_stage": "deepspeed.zero_optimization.stage",
    "aux_loss_coef": "model.router_aux_loss_coef",
    "nll_loss_coef": "objective.alpha",
    "ring_attn_size": "train.sequence_parallel_size",
}
"""Foreign key -> the dotted key here. The values may be written differently."""

IN_SECTIONS = {
    "peft.r": "peft.lora_r",
    "peft.rank": "peft.lora_r",
    "peft.alpha": "peft.lora_alpha",
    "peft.dropout": "peft.lora_dropout",
    "peft.target_modules": "peft.lora_target_modules",
    "peft.modules_to_save": "peft.lora_modules_to_save",
    "optim.betas": "optim.adam_beta1 and optim.adam_beta2",
    "optim.eps": "optim.adam_epsilon",
    "optim.scheduler": "optim.lr_scheduler_type",
    "data.path": "data.dataset_name",
    "data.name": "data.dataset_name",
    "data.train": "data.dataset_name",
    "data.split": "data.dataset_train_split",
    "model.path": "model.model_name_or_path",
    "model.name": "model.model_name_or_path",
    "train.epochs": "train.num_train_epochs",
    "train.steps": "train.max_steps",
    "train.batch_size": "train.global_batch_size",
    "train.seed": "seed",
    "train.output_dir": "output_dir",
}
"""A short name that others use in such a section -> the dotted key here."""

AS_VALUES = {
    "model": "model.model_name_or_path",
    "data": "data.dataset_name",
    "dataset": "data.dataset_name",
}
"""Section -> its key that is meant where a text stands in place of the section."""

BATCH = (
    "train.global_batch_size counts prompts over all ranks and micro-batches, and train.micro_batch_tokens "
    "bounds the memory of one"
)
TRACKERS = "metrics are in metrics.jsonl of the run folder, and madpo report draws them"
ADAMW = "AdamW is the only optimiser"
PACKED = "rows are always packed, without padding"
HUB = "nothing is uploaded; the model is in output_dir/model"

REPLACED = {
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": BATCH,
    "micro_batch_size": BATCH,
    "micro_train_batch_size": BATCH,
    "per_device_eval_batch_size": "evaluation packs micro-batches of train.micro_batch_tokens too",
    "eval_strategy": "set train.eval_steps; with data.dataset_test_split there is an evaluation at the end",
    "save_strategy": "set train.save_steps; there is a checkpoint at the end",
    "max_prompt_length": "data.max_length bounds a prompt with its completion; a prompt is never cut",
    "max_completion_length": "data.max_length bounds a prompt with its completion",
    "optimizer": ADAMW,
    "optim.optim": ADAMW,
    "optim.name": ADAMW,
    "optim.type": ADAMW,
    "fp16": "set train.bf16: true for bfloat16, false for float32",
    "torch_dtype": "set train.bf16: true for bfloat16, false for float32",
    "dtype": "set train.bf16: true for bfloat16, false for float32",
    "use_peft": "a section peft trains an adapter; without it all weights are trained",
    "finetuning_type": "a section peft trains an adapter, model.freeze leaves weights out of training",
    "adapter": "a section peft trains an adapter",
    "stage": "the command is the stage: madpo sft, madpo reward, or madpo train with objective.loss_type",
    "stages": "a file of stages is a recipe: madpo run FILE",
    "chat_template": "the tokenizer's own chat template is used",
    "template": "the tokenizer's own chat template is used",
    "trust_remote_code": "code of a model repository is never run",
    "report_to": TRACKERS,
    "run_name": "the run is named by output_dir",
    "logging_dir": TRACKERS,
    "push_to_hub": HUB,
    "hub_model_id": HUB,
    "packing": PACKED,
    "padding_free": PACKED,
    "sample_packing": PACKED,
    "packing_samples": PACKED,
    "val_size": "nothing is split off; write a held-out file and name it in data.dataset_test_split",
    "val_set_size": "nothing is split off; write a held-out file and name it in data.dataset_test_split",
    "max_samples": "all rows are used; data.datasets takes a fraction of each data set",
    "fsdp": "ZeRO-3 partitions weights, gradients and optimiser: deepspeed.zero_optimization.stage",
    "fsdp_config": "ZeRO-3 partitions weights, gradients and optimiser: deepspeed.zero_optimization.stage",
}
"""Foreign key without one key in its place -> what there is instead."""

SEVERAL = 3
"""So many foreign keys at the top of a file are no slip: the file is another trainer's."""


def counterpart(key: str, schema: type[BaseModel]) -> str | None:
    """What to use in place of a dotted key that is unknown where it stands; None where that is not known."""
    name = key.rpartition(".")[2]
    if key in REPLACED:
        return REPLACED[key]
    ours = IN_SECTIONS.get(key) or our_key(name, schema)
    if ours is None or ours == key:
        return REPLACED.get(name)
    return f"it is {ours} here"


def our_key(name: str, schema: type[BaseModel]) -> str | None:
    """The dotted key for a foreign name, or for a key of ours without its section, if it is in just one."""
    if name in RENAMED:
        return RENAMED[name]
    homes = [
        f"{section}.{name}"
        for section, field in schema.model_fields.items()
        if any(name in inner.model_fields for inner in _sections(field.annotation))
    ]
    return homes[0] if len(homes) == 1 else None


def in_place_of(section: str, value: Any) -> str | None:
    """What to write where a value stands in place of a section; None where that is not known."""
    if section in AS_VALUES and isinstance(value, str):
        return f"write {AS_VALUES[section]}={value}"
    if section == "deepspeed" and isinstance(value, str):
        return f"write the keys of {value} below it, as in deepspeed.zero_optimization.stage=2"
    return "peft={} trains an adapter" if section == "peft" else None


def other_trainer(problems: Iterable[Any], schema: type[BaseModel]) -> str:
    """Advice for a file whose keys are another trainer's, by its validation errors; else an empty text."""
    unknown = [item["loc"] for item in problems if item["type"] == "extra_forbidden"]
    foreign = [place for place in unknown if len(place) == 1 and counterpart(str(place[0]), schema)]
    return "" if len(foreign) < SEVERAL else "; madpo convert FILE translates another trainer's config"


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The section that a field holds or may hold; not those of lists, nor the objectives."""
    kinds = [kind for kind in get_args(annotation) or [annotation] if kind is not type(None)]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)][
        : len(kinds) == 1
    ]
