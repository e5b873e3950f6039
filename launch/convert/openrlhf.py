"""OpenRLHF: command lines of `openrlhf.cli`, with the flags of versions before and after 0.10."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from madpo.launch.convert import hf
from madpo.launch.convert.draft import Draft, Fate, Rule, changed, lost, not_needed, only, to, with_others
from madpo.launch.convert.losses import KL_OF_TRL, add_nll, loss_of_pairs, set_objective
from madpo.launch.convert.peer import Peer, as_list, each
from madpo.trainer.config.foreign_keys import REPLACED, TRACKERS

NEW_NAMES = {
    "save_path": "ckpt.output_dir",
    "ckpt_save_path": "ckpt.output_dir",
    "ckpt_path": "ckpt.path",
    "save_steps": "ckpt.save_steps",
    "save_hf_ckpt": "ckpt.save_hf",
    "max_ckpt_num": "ckpt.max_num",
    "max_ckpt_mem": "ckpt.max_mem",
    "load_checkpoint": "ckpt.load_enable",
    "disable_ds_ckpt": "ckpt.disable_ds",
    "use_ds_universal_ckpt": "ds.use_universal_ckpt",
    "logging_steps": "logger.logging_steps",
    "use_wandb": "logger.wandb.key",
    "wandb_org": "logger.wandb.org",
    "wandb_group": "logger.wandb.group",
    "wandb_project": "logger.wandb.project",
    "wandb_run_name": "logger.wandb.run_name",
    "use_tensorboard": "logger.tensorboard_dir",
    "eval_steps": "eval.steps",
    "eval_dataset": "eval.dataset",
    "eval_split": "eval.split",
    "train_batch_size": "train.batch_size",
    "micro_train_batch_size": "train.micro_batch_size",
    "max_epochs": "train.max_epochs",
    "seed": "train.seed",
    "full_determinism": "train.full_determinism_enable",
    "pretrain": "model.model_name_or_path",
    "model_name_or_path": "model.model_name_or_path",
    "ref_pretrain": "ref.model_name_or_path",
    "ref_offload": "ref.offload",
    "beta": "model.beta",
    "ipo": "model.ipo_enable",
    "label_smoothing": "model.label_smoothing",
    "nll_loss_coef": "model.nll_loss_coef",
    "aux_loss_coef": "model.aux_loss_coef",
    "loss": "model.loss_type",
    "margin_loss": "model.margin_loss_enable",
    "compute_fp32_loss": "model.compute_fp32_loss_enable",
    "pretrain_mode": "model.pretrain_mode_enable",
    "gradient_checkpointing": "model.gradient_checkpointing_enable",
    "gradient_checkpointing_use_reentrant": "model.gradient_checkpointing_reentrant",
    "value_head_prefix": "ds.value_head_prefix",
    "zero_stage": "ds.zero_stage",
    "bf16": "ds.bf16",
    "param_dtype": "ds.param_dtype",
    "zpg": "ds.zpg",
    "adam_offload": "ds.adam_offload",
    "attn_implementation": "ds.attn_implementation",
    "flash_attn": "ds.flash_attn",
    "use_liger_kernel": "ds.use_liger_kernel",
    "grad_accum_dtype": "ds.grad_accum_dtype",
    "overlap_comm": "ds.overlap_comm",
    "packing_samples": "ds.packing_samples",
    "ring_attn_size": "ds.ring_attn_size",
    "ring_head_stride": "ds.ring_attn_head_stride",
    "ds_tensor_parallel_size": "ds.tensor_parallel_size",
    "deepcompile": "ds.deepcompile",
    "load_in_4bit": "ds.load_in_4bit",
    "lora_rank": "ds.lora.rank",
    "lora_alpha": "ds.lora.alpha",
    "lora_dropout": "ds.lora.dropout",
    "target_modules": "ds.lora.target_modules",
    "learning_rate": "adam.lr",
    "l2": "adam.weight_decay",
    "adam_betas": "adam.betas",
    "dataset": "data.dataset",
    "dataset_probs": "data.dataset_probs",
    "dataset_split": "data.dataset_split",
    "train_split": "data.dataset_split",
    "max_samples": "data.max_samples",
    "max_len": "data.max_len",
    "prompt_key": "data.prompt_key",
    "chosen_key": "data.chosen_key",
    "rejected_key": "data.rejected_key",
    "input_key": "data.input_key",
    "output_key": "data.output_key",
    "label_key": "data.label_key",
    "input_template": "data.input_template",
    "apply_chat_template": "data.apply_chat_template",
    "tokenizer_chat_template": "data.tokenizer_chat_template",
    "multiturn": "data.multiturn",
    "disable_fast_tokenizer": "data.disable_fast_tokenizer",
    "dataloader_num_workers": "data.dataloader_num_workers",
}
"""Flag of versions before 0.10 -> the one that took its place."""

COLUMNS = {
    "data.prompt_key": "prompt",
    "data.chosen_key": "chosen",
    "data.rejected_key": "rejected",
    "data.input_key": "prompt",
    "data.output_key": "completion",
    "data.label_key": "label",
}
"""Flag that names a column -> our name of it."""


def _together(draft: Draft) -> None:
    draft.take("data.max_length", int(draft.value("data.max_len")), "data.max_len")
    draft.take("train.global_batch_size", int(draft.value("train.batch_size")), "train.batch_size")
    hf.micro_batch(draft, "train.micro_batch_size", "data.max_len")
    draft.take("train.num_train_epochs", float(draft.value("train.max_epochs")), "train.max_epochs")
    hf.schedule(draft, "lr_scheduler", "lr_warmup_steps", "lr_warmup_ratio")
    betas = draft.value("adam.betas")
    for name, beta in zip(("adam_beta1", "adam_beta2"), betas, strict=True):
        draft.take(f"optim.{name}", float(beta), "adam.betas")
    _data(draft)
    _zero(draft)
    _adapter(draft)
    _objective(draft)


def _objective(draft: Draft) -> None:
    beta, smoothing = float(draft.value("model.beta")), float(draft.value("model.label_smoothing") or 0)
    if draft.task == "sft":
        loss: dict[str, Any] = {"loss_type": "nll"}
    elif draft.task == "reward":
        loss = {"loss_type": "bradley_terry", "margin": bool(draft.value("model.margin_loss_enable"))}
    elif draft.task == "kto":
        loss = {"loss_type": "kto", "beta": beta}
        draft.remarks.append(KL_OF_TRL)
    elif draft.value("model.ipo_enable"):
        loss = add_nll(draft, {"loss_type": "ipo", "beta": beta, "average": False}, "model.nll_loss_coef")
    else:
        loss = add_nll(draft, loss_of_pairs(draft, "sigmoid", beta, smoothing), "model.nll_loss_coef")
    keys = ("model.beta", "model.ipo_enable", "model.label_smoothing", "model.margin_loss_enable")
    set_objective(draft, loss, *keys, "model.loss_type")


def _data(draft: Draft) -> None:
    names = [name.partition("@")[0] for name in as_list(draft.value("data.dataset"))]
    columns = {
        ours: draft.value(flag) for flag, ours in COLUMNS.items() if draft.value(flag) not in (None, ours)
    }
    split = str(draft.value("data.dataset_split"))
    if len(names) == 1:
        draft.take("data.dataset_name", names[0], "data.dataset")
        draft.take("data.dataset_train_split", split, "data.dataset_split")
    elif names:
        draft.take("data.datasets", [{"path": name, "split": split} for name in names], "data.dataset")
        draft.settle(Fate.TAKEN, "data.dataset_split")
    if columns:
        draft.take("data.columns", columns, *COLUMNS)
    draft.settle(Fate.TAKEN, *COLUMNS)
    if draft.value("eval.dataset"):
        draft.settle(Fate.CHANGED, "eval.dataset", why="a held-out split of a data set, not another data set")
        draft.by_hand.append(
            "data.dataset_test_split: put the rows of eval.dataset beside the training split"
        )
    template = draft.value("data.input_template")
    if draft.task == "sft" and not draft.value("data.apply_chat_template") and template:
        why = "rows are tokenised as they are; write the template into the prompts"
        draft.settle(Fate.CHANGED, "data.input_template", why=why)
        draft.by_hand.append(
            f"prompts: OpenRLHF puts them into {template!r}, unless apply_chat_template is set"
        )


def _zero(draft: Draft) -> None:
    zero = "deepspeed.zero_optimization"
    stage = int(draft.value("ds.zero_stage"))
    draft.take(f"{zero}.stage", max(1, stage), "ds.zero_stage", why="" if stage else "1 comes nearest to 0")
    if (draft.value("ds.zpg") or 1) > 1:
        draft.take(f"{zero}.zero_hpz_partition_size", int(draft.value("ds.zpg")), "ds.zpg")
    if draft.value("ds.adam_offload"):
        draft.take(f"{zero}.offload_optimizer", {"device": "cpu"}, "ds.adam_offload")
    if draft.value("ds.overlap_comm"):
        draft.take(f"{zero}.overlap_comm", True, "ds.overlap_comm")
    draft.settle(Fate.TAKEN, "ds.zpg")


def _adapter(draft: Draft) -> None:
    rank, keys = (
        int(draft.value("ds.lora.rank")),
        ("ds.lora.alpha", "ds.lora.target_modules", "ds.load_in_4bit"),
    )
    if not rank:
        draft.settle(Fate.TAKEN, "ds.lora.rank", "ds.lora.dropout", *keys)
        return
    draft.take("peft.lora_r", rank, "ds.lora.rank")
    draft.take("peft.lora_alpha", int(draft.value("ds.lora.alpha")), "ds.lora.alpha")
    targets = as_list(draft.value("ds.lora.target_modules"))
    every = targets == ["all-linear"]
    draft.take("peft.lora_target_modules", "all-linear" if every else targets, "ds.lora.target_modules")
    draft.take("peft.load_in_4bit", bool(draft.value("ds.load_in_4bit")), "ds.load_in_4bit")
    hf.nested_quantisation(draft)
    hf.dropout(draft, "ds.lora.dropout")


def steps(key: str) -> Rule:
    """A rule for a number of steps, of which -1 stands for none."""

    def rule(draft: Draft, name: str) -> None:
        value = int(draft.value(name))
        if value > 0:
            draft.take(key, value, name)
        else:
            draft.settle(Fate.TAKEN, name)

    return rule


def evaluate_steps(draft: Draft, name: str) -> None:
    """A rule for the steps between evaluations, which need a held-out split."""
    why = "set data.dataset_test_split first" if int(draft.value(name)) > 0 else ""
    draft.settle(Fate.LOST if why else Fate.TAKEN, name, why=why)


PROGRAMS = {"sft": "sft", "rm": "reward", "dpo": "dpo", "kto": "kto", "kd": "sft"}


def _task(given: Mapping[str, Any], program: str) -> str | None:
    return PROGRAMS.get(program.rpartition("train_")[2])


def _defaults(task: str) -> dict[str, Any]:
    rates = {"sft": 5e-6, "reward": 9e-6, "kto": 1e-6}
    return {
        "train.batch_size": 128,
        "train.micro_batch_size": 1 if task == "reward" else 8,
        "train.max_epochs": 2 if task == "sft" else 1,
        "train.seed": 42,
        "data.max_len": 2048 if task == "sft" else 512,
        "data.dataset_split": "train",
        "data.input_template": "User: {}\nAssistant: ",
        "adam.lr": rates.get(task, 1e-5),
        "adam.betas": [0.9, 0.95],
        "adam.weight_decay": 0.0,
        "max_norm": 1.0,
        "lr_scheduler": "cosine_with_min_lr",
        "lr_warmup_ratio": 0.03,
        "model.beta": 0.1,
        "ckpt.output_dir": "./ckpt",
        "ds.zero_stage": 2,
        "ds.param_dtype": "bf16",
        "ds.lora.rank": 0,
        "ds.lora.alpha": 16,
        "ds.lora.target_modules": "all-linear",
        "logger.logging_steps": 1,
    }


TOGETHER = """
    train.batch_size train.micro_batch_size train.max_epochs data.max_len data.dataset
    data.dataset_split eval.dataset eval.split lr_scheduler lr_warmup_ratio adam.betas ds.zero_stage
    ds.zpg ds.adam_offload ds.overlap_comm ds.lora.rank ds.lora.alpha ds.lora.dropout
    ds.lora.target_modules ds.load_in_4bit model.beta model.ipo_enable model.label_smoothing
    model.nll_loss_coef model.margin_loss_enable model.loss_type
"""
RULES: dict[str, Rule] = {
    **each(TOGETHER, with_others),
    **each(" ".join(COLUMNS), with_others),
    "ckpt.output_dir": to("output_dir"),
    "ckpt.path": changed("checkpoints are in output_dir"),
    "ckpt.save_steps": steps("train.save_steps"),
    "ckpt.max_num": to("train.save_total_limit", hf.at_least_one),
    "logger.logging_steps": to("train.logging_steps", hf.at_least_one),
    "eval.steps": evaluate_steps,
    "train.seed": to("seed"),
    "model.model_name_or_path": to("model.model_name_or_path"),
    "ref.model_name_or_path": to("model.ref_model_name_or_path"),
    "ref.offload": changed(
        "ZeRO-3 partitions the reference too; model.reference: cached needs none in memory"
    ),
    "model.aux_loss_coef": to("model.router_aux_loss_coef", float),
    "model.gradient_checkpointing_enable": to("model.gradient_checkpointing", bool),
    "model.pretrain_mode_enable": lost("completions are trained on; a column text is trained on as a whole"),
    "ds.param_dtype": to("train.bf16", lambda given: True),
    "ds.bf16": to("train.bf16", bool),
    "ds.attn_implementation": to("model.attention", hf.attention),
    "ds.use_liger_kernel": to("model.use_liger_kernel", bool),
    "ds.ring_attn_size": to("train.sequence_parallel_size", int),
    "ds.tensor_parallel_size": only(1, why="every rank has its own rows; ZeRO-3 partitions the weights"),
    "ds.deepcompile": only(False, why="layers run uncompiled"),
    "adam.lr": to("optim.lr", float),
    "adam.weight_decay": to("optim.weight_decay", float),
    "adam.eps": to("optim.adam_epsilon", float),
    "max_norm": to("optim.max_grad_norm", float),
    "min_lr_ratio": only(0, 0.0, why="the learning rate falls to 0"),
    "optim": only("adam", why="AdamW is the only optimiser"),
    "data.dataset_probs": changed("data.datasets takes a fraction of each data set, not shares of the sum"),
    "data.tokenizer_chat_template": changed("the tokenizer's own chat template is used"),
    "data.multiturn": only(False, why="the last message is trained on", fate=Fate.CHANGED),
    "data.input_template": lost("rows are tokenised as they are; write the template into the prompts"),
    "teacher_model": lost("madpo has no distillation"),
    "kd_coef": lost("madpo has no distillation"),
    "data.max_samples": lost(REPLACED["max_samples"]),
    **each(
        """
        logger.wandb.key logger.wandb.org logger.wandb.group logger.wandb.project logger.wandb.run_name
        logger.tensorboard_dir
        """,
        lost(TRACKERS),
    ),
    **each(
        """
        ckpt.load_enable ckpt.save_hf ckpt.disable_ds ckpt.max_mem ds.use_universal_ckpt
        ds.packing_samples ds.flash_attn ds.ring_attn_head_stride ds.grad_accum_dtype
        ds.value_head_prefix ds.experts_implementation model.compute_fp32_loss_enable
        model.gradient_checkpointing_reentrant train.full_determinism_enable local_rank
        data.apply_chat_template data.disable_fast_tokenizer data.dataloader_num_workers
        teacher_offload
        """,
        not_needed,
    ),
}

OPENRLHF = Peer("OpenRLHF", RULES, _together, _defaults, _task, NEW_NAMES)
