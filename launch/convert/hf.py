"""Rules for the keys of transformers' TrainingArguments, on which TRL, LLaMA-Factory and Axolotl build."""

from __future__ import annotations

from typing import Any

from madpo.launch.convert.draft import Draft, Fate, Rule, lost, not_needed, only, to, with_others
from madpo.launch.convert.peer import completions, each, otherwise, plain
from madpo.trainer.config.foreign_keys import HUB, TRACKERS
from madpo.trainer.errors import UserError

SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adam", "adamw")


def batch(draft: Draft, per_device: str, accumulation: str, max_length: str) -> None:
    """Set the sizes of the global batch and of a micro-batch. Raises UserError without a number of GPUs."""
    rows, steps = int(draft.value(per_device) or 1), int(draft.value(accumulation) or 1)
    if draft.gpus is None:
        raise UserError(
            f"--gpus: train.global_batch_size is {per_device} {rows} x {accumulation} {steps} x the number "
            "of GPUs, which the file does not say; give it with the option --gpus, as in --gpus 8"
        )
    share = int(draft.config.get("train.sequence_parallel_size", 1))
    draft.take(
        "train.global_batch_size", rows * steps * max(1, draft.gpus // share), per_device, accumulation
    )
    draft.origins["train.global_batch_size"] = (
        f"{per_device} {rows} x {accumulation} {steps} x {draft.gpus} GPUs"
    )
    if share > 1:
        draft.origins["train.global_batch_size"] += f" / {share} to a row"
    micro_batch(draft, per_device, max_length)


def micro_batch(draft: Draft, per_device: str, max_length: str) -> None:
    """Set the tokens of a micro-batch to those of the rows of one, if all were of the largest length."""
    rows, length = int(draft.value(per_device) or 1), int(draft.value(max_length))
    draft.take("train.micro_batch_tokens", rows * completions(draft) * length, per_device)
    draft.origins["train.micro_batch_tokens"] = (
        f"room for {rows} x {completions(draft)} rows of {length} tokens; only memory depends on it"
    )


def schedule(draft: Draft, kind: str, warmup_steps: str, warmup_ratio: str) -> None:
    """Set the course of the learning rate."""
    name = str(draft.value(kind))
    if name in SCHEDULES:
        draft.take("optim.lr_scheduler_type", SCHEDULES[name], kind)
    elif name.startswith("cosine"):
        draft.take("optim.lr_scheduler_type", "cosine", kind, why=f"{name} here falls to 0 once")
    else:
        draft.settle(Fate.LOST, kind, why="constant, linear and cosine (the default) are there")
    steps, share = draft.value(warmup_steps) or 0, draft.value(warmup_ratio) or 0
    if (steps or share) and name != "constant":
        draft.remarks.append("warm-up starts above 0 here, so that the first step trains; there at 0")
    if name == "constant":
        draft.settle(Fate.TAKEN, warmup_steps, warmup_ratio)  # transformers ignores it too
    elif steps >= 1:
        draft.take("optim.warmup_steps", int(steps), warmup_steps)
        draft.settle(
            Fate.TAKEN if not share else Fate.CHANGED, warmup_ratio, why=f"{warmup_steps} goes first"
        )
    else:
        used = warmup_steps if steps else warmup_ratio
        draft.take("optim.warmup_ratio", float(steps or share), used)
        draft.settle(Fate.TAKEN, warmup_steps, warmup_ratio)


def duration(draft: Draft, epochs: str, steps: str) -> None:
    """Set the number of epochs or of steps."""
    if (draft.value(steps) or 0) > 0:
        draft.take("train.max_steps", int(draft.value(steps)), steps)
        draft.settle(Fate.TAKEN, epochs)
    else:
        draft.take("train.num_train_epochs", float(draft.value(epochs)), epochs)
        draft.settle(Fate.TAKEN, steps)


def saving(draft: Draft) -> None:
    """Set when checkpoints are written."""
    strategy, steps = str(draft.value("save_strategy")), draft.value("save_steps") or 0
    if strategy in ("no", "False") or not steps:
        draft.settle(Fate.TAKEN, "save_strategy", "save_steps")
    elif strategy != "steps":
        draft.settle(Fate.TAKEN, "save_steps")
        draft.settle(Fate.CHANGED, "save_strategy", why="there is a checkpoint at the end")
    elif steps < 1:
        draft.settle(Fate.LOST, "save_steps", why="a number of steps, no share of them")
        draft.settle(Fate.TAKEN, "save_strategy")
    else:
        draft.take("train.save_steps", int(steps), "save_steps")
        draft.settle(Fate.TAKEN, "save_strategy")


def evaluating(draft: Draft) -> bool:
    """Set when held-out data is evaluated; whether it is at all."""
    strategy = str(draft.value("eval_strategy"))
    steps = draft.value("eval_steps") or draft.value("logging_steps") or 0
    draft.settle(Fate.TAKEN, "do_eval", "eval_strategy", "eval_steps")
    if strategy in ("no", "False"):
        return False
    if strategy != "steps":
        draft.settle(Fate.CHANGED, "eval_strategy", why="there is an evaluation at the end")
    elif steps < 1:
        draft.settle(Fate.LOST, "eval_steps", why="a number of steps, no share of them")
    else:
        draft.take("train.eval_steps", int(steps), "eval_steps", "eval_strategy")
    return True


def precision(draft: Draft, default: bool) -> None:
    """Set whether it trains in bfloat16. `default`: if the file asks for no type."""
    bf16, fp16 = draft.value("bf16"), draft.value("fp16")
    if fp16 not in (None, False):
        draft.take("train.bf16", True, "fp16", why="float16 is not here")
        draft.settle(Fate.TAKEN, "bf16")
    else:
        value = default if bf16 is None else bf16 is not False
        draft.take("train.bf16", value, "bf16")
        draft.settle(Fate.TAKEN, "fp16")


def attention(value: Any) -> str:
    """The kernel of the packed attention for a name of transformers'."""
    names = {"sdpa": "sdpa", "eager": "sdpa", "flex_attention": "flex"}
    return names.get(str(value), "auto")


def steps_of(key: str) -> Rule:
    """A rule for a number of steps, which transformers also takes as a share of all steps."""

    def rule(draft: Draft, name: str) -> None:
        value = draft.value(name)
        if value < 1:
            draft.settle(Fate.LOST, name, why="a number of steps, no share of them")
        else:
            draft.take(key, int(value), name)

    return rule


def hub(draft: Draft, name: str) -> None:
    """A rule for a key of an upload, which says nothing where none is asked for."""
    draft.settle(Fate.LOST if draft.value("push_to_hub") else Fate.TAKEN, name, why=HUB)


def order(draft: Draft, name: str) -> None:
    """A rule for the order of the data."""
    orders = {"random": "shuffled", "sequential": "as_is"}
    if draft.value(name) in orders:
        draft.take("data.order", orders[draft.value(name)], name)
    else:
        draft.settle(Fate.LOST, name, why="rows are packed, so that their lengths do not matter")


def at_least_one(value: Any) -> int:
    return max(1, int(value))


LORA = plain("lora_r", "lora_alpha", "lora_modules_to_save", "use_rslora", "use_dora")
LORA |= plain("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant")
DROPOUT = "a dropout in the policy is noise in the margin, so only 0 is allowed; lower the rank to regularise"


def adapter(draft: Draft, trained: bool, names: list[str]) -> None:
    """Settle the keys of an adapter, `names`, where none is trained; and its dropout where one is."""
    if trained:
        dropout(draft, "lora_dropout")
    else:
        draft.settle(Fate.TAKEN, *names)


def dropout(draft: Draft, name: str) -> None:
    """Settle the dropout of an adapter, which is 0 here."""
    given = draft.value(name)
    draft.settle(Fate.LOST if given else Fate.TAKEN, name, why=DROPOUT if given else "")
    if given and name not in draft.given:
        draft.remarks.append(f"{name}: {given} is the default of {draft.peer}; {DROPOUT}")


def nested_quantisation(draft: Draft, name: str = "") -> None:
    """Quantise the constants of a base in 4 bits too, which all trainers but TRL do unless `name` says no."""
    if draft.value("load_in_4bit") or draft.config.get("peft.load_in_4bit"):
        draft.take("peft.use_bnb_nested_quant", draft.value(name) is not False, name)


def zero_2_where_needed(draft: Draft) -> None:
    """Set ZeRO's stage for adapters that do not work with stage 3."""
    needs = [x for x in ("load_in_4bit", "load_in_8bit", "use_dora") if draft.config.get(f"peft.{x}")]
    if needs:
        draft.config["deepspeed.zero_optimization.stage"] = 2
        draft.origins["deepspeed.zero_optimization.stage"] = f"peft.{needs[0]} needs it"


RULES: dict[str, Rule] = {
    **plain("learning_rate", "weight_decay", "max_grad_norm"),
    **plain("adam_beta1", "adam_beta2", "adam_epsilon", "use_liger_kernel", "model_name_or_path"),
    **plain("router_aux_loss_coef", "dataset_num_proc"),
    "output_dir": to("output_dir"),
    "seed": to("seed"),
    "logging_steps": steps_of("train.logging_steps"),
    "save_total_limit": to("train.save_total_limit", at_least_one),
    "attn_implementation": to("model.attention", attention),
    "gradient_checkpointing": to("model.gradient_checkpointing", bool),
    "model_revision": to("model.model_revision"),
    "activation_offloading": to("model.activation_offloading", bool),
    "ddp_timeout": to("launch.timeout_minutes", lambda seconds: float(seconds) / 60),
    "optim": only(*ADAMW, why="AdamW is the only optimiser", fate=Fate.CHANGED),
    "train_sampling_strategy": order,
    "logging_strategy": only("steps", why="set train.logging_steps"),
    "logging_first_step": only(False, why="train.logging_steps: 1 logs every step"),
    "report_to": only("none", [], ["none"], why=TRACKERS),
    "push_to_hub": only(False, why=HUB),
    "group_by_length": not_needed,
    "torch_compile": only(False, why="layers run uncompiled"),
    "load_best_model_at_end": only(False, why="the last weights are exported"),
    "save_only_model": only(False, why="checkpoints hold the optimiser too, for an exact continuation"),
    "trust_remote_code": only(False, why="code of a model repository is never run"),
    "label_smoothing_factor": only(0, 0.0, why="objective cdpo has label_smoothing"),
    "dataloader_drop_last": only(False, why="no row is left out"),
    "neftune_noise_alpha": lost("no noise is added to embeddings"),
    "truncation_mode": only("keep_start", why="completions lose their end"),
    **otherwise("per_device_eval_batch_size", "max_prompt_length"),
    **each("hub_model_id hub_strategy hub_private_repo hub_revision", hub),
    **otherwise("run_name", "logging_dir"),
    "lr_scheduler_kwargs": lost("the learning rate falls to 0"),
    **otherwise("fsdp", "fsdp_config"),
}
NOT_NEEDED = """
    do_train do_predict overwrite_output_dir remove_unused_columns log_level log_level_replica
    disable_tqdm dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
    ddp_backend local_rank tf32 use_cache average_tokens_across_devices gradient_checkpointing_kwargs
    activation_checkpointing_kwargs resume_from_checkpoint eval_on_start eval_accumulation_steps
    logging_nan_inf_filter torch_empty_cache_steps accelerator_config save_safetensors use_reentrant
    pad_to_multiple_of skip_memory_metrics
"""
RULES |= each(NOT_NEEDED, not_needed)
TOGETHER = """
    per_device_train_batch_size gradient_accumulation_steps lr_scheduler_type warmup_steps warmup_ratio
    num_train_epochs max_steps save_strategy save_steps eval_strategy eval_steps do_eval bf16 fp16
    lora_dropout
"""
RULES |= each(TOGETHER, with_others)

DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "seed": 42,
    "logging_steps": 500,
    "save_strategy": "steps",
    "save_steps": 500,
    "eval_strategy": "no",
}
"""transformers' own values."""

ALIASES = {
    "evaluation_strategy": "eval_strategy",
    "torch_dtype": "dtype",
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
"""Names of other versions -> transformers' own."""
