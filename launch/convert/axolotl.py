"""Axolotl: YAML files with a `base_model`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from madpo.launch.convert import hf
from madpo.launch.convert.draft import Draft, Fate, Rule, changed, lost, not_needed, only, to, with_others
from madpo.launch.convert.losses import (
    KL_OF_TRL,
    NLL_OF_TRL,
    ORPO_OF_TRL,
    SMOOTHED,
    add_nll,
    loss_of_pairs,
    set_objective,
    simpo,
    weighted,
)
from madpo.launch.convert.peer import Peer, as_list, each, missing, plain
from madpo.launch.convert.zero import deepspeed_block
from madpo.trainer.config.foreign_keys import REPLACED, TRACKERS
from madpo.trainer.errors import UserError

LORA_KEYS = [*hf.LORA, "lora_dropout", "lora_target_modules", "lora_target_linear"]
LORA_KEYS += ["peft_use_dora", "peft_use_rslora"]
LOSS_KEYS = ["rl", "rl_beta", "reward_model", "dpo_loss_type", "dpo_loss_weights", "dpo_label_smoothing"]
LOSS_KEYS += ["dpo_use_weighting", "orpo_alpha", "simpo_gamma", "cpo_alpha", "kto_desirable_weight"]
LOSS_KEYS += ["kto_undesirable_weight", "center_rewards_coefficient"]
CONVERSATIONS = "of a conversation, the last message is trained on; Axolotl trains on every answer in it"


def _together(draft: Draft) -> None:
    draft.take("data.max_length", int(draft.value("sequence_len")), "sequence_len")
    if (draft.value("context_parallel_size") or 1) > 1:
        ranks = int(draft.value("context_parallel_size"))
        draft.take("train.sequence_parallel_size", ranks, "context_parallel_size")
    draft.settle(Fate.TAKEN, "context_parallel_size")
    hf.batch(draft, "micro_batch_size", "gradient_accumulation_steps", "sequence_len")
    hf.schedule(draft, "lr_scheduler", "warmup_steps", "warmup_ratio")
    hf.duration(draft, "num_epochs", "max_steps")
    hf.saving(draft)
    hf.precision(draft, default=True)
    held_out = hf.evaluating(draft)
    _epochs(draft, "evals_per_epoch", "set train.eval_steps to the steps of an epoch, divided by it")
    _epochs(draft, "saves_per_epoch", "there is a checkpoint at the end; or set train.save_steps")
    _data(draft, held_out or bool(draft.value("evals_per_epoch")))
    _checkpointing(draft)
    _adapter(draft)
    _objective(draft)


def _epochs(draft: Draft, name: str, why: str) -> None:
    draft.settle(Fate.CHANGED if draft.value(name) else Fate.TAKEN, name, why=why)


def _objective(draft: Draft) -> None:
    beta = float(draft.value("rl_beta"))
    if draft.task == "sft":
        loss: dict[str, Any] = {"loss_type": "nll"}
        draft.remarks.append(CONVERSATIONS)
    elif draft.task == "reward":
        weight = float(draft.value("center_rewards_coefficient") or 0)
        loss = {"loss_type": "bradley_terry", "center_rewards_coefficient": weight}
    elif draft.task == "kto":
        weights = {f"{x}_weight": float(draft.value(f"kto_{x}_weight")) for x in ("desirable", "undesirable")}
        loss = {"loss_type": "kto", "beta": beta, **weights}
        draft.remarks.append(KL_OF_TRL)
    elif draft.task == "orpo":
        loss = {
            "loss_type": "orpo",
            "lambda": float(draft.given.get("rl_beta") or draft.value("orpo_alpha") or 0.1),
        }
        draft.remarks.append(ORPO_OF_TRL)
    elif draft.task == "simpo":
        loss = simpo(beta, float(draft.value("simpo_gamma")), float(draft.value("cpo_alpha")))
    else:
        loss = _preference(draft, beta)
    set_objective(draft, loss, *LOSS_KEYS)


def _preference(draft: Draft, beta: float) -> dict[str, Any]:
    kinds = as_list(draft.value("dpo_loss_type")) or ["ipo" if draft.value("rl") == "ipo" else "sigmoid"]
    smoothing = float(draft.value("dpo_label_smoothing") or 0)
    if smoothing and "sigmoid" in kinds:
        draft.remarks.append(f"dpo_label_smoothing: {SMOOTHED}")
    further = {"use_weighting": draft.value("dpo_use_weighting")}
    losses = [loss_of_pairs(draft, kind, beta, smoothing, further) for kind in kinds]
    return add_nll(draft, weighted(losses, draft.value("dpo_loss_weights")), "rpo_alpha", NLL_OF_TRL)


def _adapter(draft: Draft) -> None:
    kind = draft.value("adapter")
    stored = draft.value("lora_model_dir")
    hf.adapter(draft, kind in ("lora", "qlora"), LORA_KEYS)
    draft.settle(Fate.TAKEN if kind in (None, "lora", "qlora") else Fate.LOST, "adapter", why="LoRA is there")
    if stored:
        draft.take("model.model_name_or_path", stored, "lora_model_dir")
        draft.take("peft.base_model_name_or_path", draft.value("base_model"), "base_model")
    if kind not in ("lora", "qlora"):
        return
    targets = draft.value("lora_target_modules")
    everything = draft.value("lora_target_linear") or targets == "all-linear"
    names = ("lora_target_linear", "lora_target_modules")
    draft.take("peft.lora_target_modules", "all-linear" if everything else as_list(targets), *names)
    hf.nested_quantisation(draft)


def _checkpointing(draft: Draft) -> None:
    value = draft.value("gradient_checkpointing")
    draft.take("model.gradient_checkpointing", bool(value), "gradient_checkpointing")
    offloads = value == "offload" or draft.value("activation_offloading")
    if offloads:
        draft.take("model.activation_offloading", True, "gradient_checkpointing", "activation_offloading")
    draft.settle(Fate.TAKEN, "activation_offloading")


ADAPTERS = {
    "intel": "orca_pairs",
    "ultra": "ultrafeedback_binarized",
    "argilla": "ultrafeedback_binarized",
    "nectar": "nectar",
    "alpaca": "alpaca",
    "sharegpt": "sharegpt",
}
"""The end of a data set's `type` -> the adapter that reads such rows."""
FOUND_BY_COLUMNS = ("argilla_chat", "chat_template", "completion", "pretrain", "prompt_pairs", "default")
COLUMNS = {"field_chosen": "chosen", "field_rejected": "rejected", "field": "text", "field_prompt": "prompt"}
COLUMNS |= {"field_completion": "completion", "field_label": "label"}
IGNORED = ("message_property_mappings", "roles", "ds_type", "trust_remote_code", "chat_template", "shards")


def _data(draft: Draft, held_out: bool) -> None:
    parts = [_part(draft, number, part) for number, part in enumerate(draft.value("datasets") or [])]
    if len(parts) == 1:
        ours = {"path": "dataset_name", "name": "dataset_config", "split": "dataset_train_split"}
        for key, value in parts[0].items():
            draft.take(f"data.{ours.get(key, key)}", value, "datasets")
    elif parts:
        draft.take("data.datasets", parts, "datasets")
    if draft.value("test_datasets"):
        draft.settle(
            Fate.CHANGED, "test_datasets", why="a held-out split of a data set, not another data set"
        )
        draft.by_hand.append(
            "data.dataset_test_split: put the rows of test_datasets beside the training split"
        )
    if not held_out or not draft.value("val_set_size"):
        draft.settle(Fate.TAKEN, "val_set_size")


def _part(draft: Draft, number: int, part: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `data.datasets` for one of the file's data sets."""
    kind = part.get("type")
    fields = {**part, **kind} if isinstance(kind, dict) else part
    messages = "messages" if draft.task == "sft" else "prompt"
    columns = {ours: fields[name] for name, ours in COLUMNS.items() if fields.get(name) not in (None, ours)}
    if fields.get("field_messages") not in (None, messages):
        columns[messages] = fields["field_messages"]
    found = {"path": part.get("path"), "name": part.get("name"), "split": part.get("split")}
    found |= {"adapter": _reader(draft, number, kind), "columns": columns}
    unread = sorted(part.keys() - found.keys() - COLUMNS.keys() - {"type", "field_messages", *IGNORED})
    if unread:
        draft.by_hand.append(f"datasets[{number}].{', '.join(unread)}: not taken over; see docs/data.md")
    return {key: value for key, value in found.items() if value}


def _reader(draft: Draft, number: int, kind: Any) -> str | None:
    """The adapter for a data set's `type`; None where its columns tell how it is read."""
    end = str(kind).rpartition(".")[2]
    if kind is None or isinstance(kind, dict) or end in FOUND_BY_COLUMNS:
        return None
    if draft.task == "kto" and end == "ultra":
        return "kto"
    if end not in ADAPTERS:
        draft.by_hand.append(f"datasets[{number}].type: {kind}: choose data.adapter; see docs/data.md")
    return ADAPTERS.get(end)


TASKS = {"dpo": "dpo", "ipo": "dpo", "kto": "kto", "orpo": "orpo", "simpo": "simpo"}


def _task(given: Mapping[str, Any], program: str) -> str | None:
    rl = given.get("rl")
    if rl is not None and rl not in TASKS:
        raise UserError(f"rl: {rl}: madpo has no on-policy RL; {', '.join(TASKS)} are converted")
    return TASKS[rl] if rl is not None else "reward" if given.get("reward_model") else "sft"


def _defaults(task: str) -> dict[str, Any]:
    return {
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "sequence_len": 512,
        "num_epochs": 1.0,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.03,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": 42,
        "output_dir": "./model-out",
        "gradient_checkpointing": False,
        "save_strategy": "steps",
        "eval_strategy": "no",
        "rl_beta": 0.1,
        "simpo_gamma": 0.5,
        "cpo_alpha": 1.0,
        "kto_desirable_weight": 1.0,
        "kto_undesirable_weight": 1.0,
    }


ALIASES = {
    **hf.ALIASES,
    "sequence_parallel_degree": "context_parallel_size",
    "dataset_processes": "dataset_num_proc",
    "model_revision": "revision_of_model",
    "dpo_beta": "rl_beta",
}
TOGETHER = """
    sequence_len context_parallel_size micro_batch_size num_epochs lr_scheduler evals_per_epoch
    saves_per_epoch datasets test_datasets lora_model_dir lora_target_modules lora_target_linear
    rpo_alpha
"""
RULES: dict[str, Rule] = {
    **{key: rule for key, rule in hf.RULES.items() if key not in ("model_name_or_path", "optim")},
    **each(TOGETHER, with_others),
    **each(" ".join(LOSS_KEYS), with_others),
    **hf.LORA,
    **plain("base_model", "tokenizer_config", "revision_of_model", "peft_use_dora", "peft_use_rslora"),
    "deepspeed": deepspeed_block,
    "optimizer": only(*hf.ADAMW, why="AdamW is the only optimiser", fate=Fate.CHANGED),
    "precompute_ref_log_probs": to("model.reference", lambda given: "cached" if given else "auto"),
    "streaming": to("data.streaming"),
    "shuffle_merged_datasets": to("data.order", lambda shuffled: "shuffled" if shuffled else "as_is"),
    "chat_template": only("tokenizer_default", why=REPLACED["chat_template"], fate=Fate.CHANGED),
    "chat_template_kwargs": to("data.chat_template_kwargs"),
    "train_on_inputs": only(False, why="completions are trained on, prompts never"),
    "dataset_prepared_path": changed("tokenised data is kept in data.cache_dir"),
    "dataset_exact_deduplication": only(
        False, why="data.merge_prompts joins rows of a prompt; none is left out"
    ),
    "special_tokens": changed(
        "the tokenizer's own; or save one with others and name it in tokenizer_name_or_path"
    ),
    "tokens": lost("add them to the tokenizer; model.resize_embeddings adds their embeddings"),
    "eot_tokens": changed("the chat template ends a completion"),
    "unfrozen_parameters": lost("model.freeze names what is not trained"),
    "loss_watchdog_threshold": changed("a loss that is not a number stops the run"),
    "loss_watchdog_patience": changed("a loss that is not a number stops the run"),
    "excess_length_strategy": only(
        "truncate", why="completions lose their end; too long prompts are dropped"
    ),
    "loraplus_lr_ratio": lost("both matrices of an adapter have optim.lr"),
    "early_stopping_patience": lost("no run ends early; the last weights are exported"),
    "adapter": with_others,
    **missing("max_samples", "val_set_size"),
    **each(
        """
        model_type tokenizer_type num_labels sample_packing eval_sample_packing pad_to_sequence_len
        gradient_checkpointing_kwargs eval_batch_size flash_attention sdp_attention
        xformers_attention flex_attention fsdp_version dp_shard_size dp_replicate_size
        tokenizer_use_fast save_first_step logging_first_step strict lora_mlp_kernel lora_qkv_kernel
        lora_o_kernel sample_packing_eff_est
        """,
        not_needed,
    ),
    **each(
        """
        wandb_project wandb_entity wandb_watch wandb_name wandb_log_model wandb_run_id use_wandb
        mlflow_experiment_name comet_project_name use_tensorboard
        """,
        only(False, "", why=TRACKERS),
    ),
    "plugins": lost("madpo's own kernels are used; model.use_liger_kernel turns Liger's on"),
    "tensor_parallel_size": only(1, why="every rank has its own rows; ZeRO-3 partitions the weights"),
}

AXOLOTL = Peer("Axolotl", RULES, _together, _defaults, _task, ALIASES)
