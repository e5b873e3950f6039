"""LLaMA-Factory: YAML files with a `stage`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from madpo.launch.convert import hf
from madpo.launch.convert.draft import Draft, Fate, Rule, changed, lost, not_needed, only, to, with_others
from madpo.launch.convert.losses import KL_OF_TRL, add_nll, loss_of_pairs, set_objective, simpo, weighted
from madpo.launch.convert.peer import Peer, as_list, each, missing, otherwise, plain
from madpo.launch.convert.zero import deepspeed_block
from madpo.trainer.config.foreign_keys import TRACKERS
from madpo.trainer.errors import UserError

LORA_KEYS = ["lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target", "use_rslora"]
LORA_KEYS += ["use_dora", "quantization_bit", "quantization_type", "double_quantization"]
LOSS_KEYS = ["pref_loss", "pref_beta", "simpo_gamma", "dpo_label_smoothing", "kto_chosen_weight"]
LOSS_KEYS += ["kto_rejected_weight", "use_dft_loss", "ld_alpha"]
CONVERSATIONS = (
    "of a conversation, the last message is trained on; LLaMA-Factory trains on every answer in it, unless "
    "mask_history is set"
)


def _together(draft: Draft) -> None:
    draft.take("data.max_length", int(draft.value("cutoff_len")), "cutoff_len")
    hf.batch(draft, "per_device_train_batch_size", "gradient_accumulation_steps", "cutoff_len")
    hf.schedule(draft, "lr_scheduler_type", "warmup_steps", "warmup_ratio")
    hf.duration(draft, "num_train_epochs", "max_steps")
    hf.saving(draft)
    hf.precision(draft, default=bool(draft.value("pure_bf16")))
    draft.settle(Fate.TAKEN, "pure_bf16")
    _data(draft, held_out=hf.evaluating(draft))
    _tuning(draft)
    _objective(draft)


def _objective(draft: Draft) -> None:
    beta = float(draft.value("pref_beta"))
    if draft.task == "sft":
        loss: dict[str, Any] = {"loss_type": "dft" if draft.value("use_dft_loss") else "nll"}
        draft.remarks.append(CONVERSATIONS)
    elif draft.task == "reward":
        loss = {"loss_type": "bradley_terry"}
    elif draft.task == "kto":
        desirable, undesirable = draft.value("kto_chosen_weight"), draft.value("kto_rejected_weight")
        loss = {"loss_type": "kto", "beta": beta}
        loss |= {"desirable_weight": float(desirable), "undesirable_weight": float(undesirable)}
        draft.remarks.append(KL_OF_TRL)
    else:
        loss = _preference(draft, beta)
    set_objective(draft, loss, *LOSS_KEYS, "stage")


def _preference(draft: Draft, beta: float) -> dict[str, Any]:
    kind, smoothing = str(draft.value("pref_loss")), float(draft.value("dpo_label_smoothing") or 0)
    if kind == "orpo":
        loss: dict[str, Any] = {"loss_type": "orpo", "lambda": beta}
    elif kind == "simpo":
        loss = simpo(beta, float(draft.value("simpo_gamma")))
    else:
        loss = loss_of_pairs(draft, kind, beta, smoothing, {"ld_alpha": draft.value("ld_alpha")})
    loss = add_nll(draft, loss, "pref_ftx")
    weight = float(draft.value("pref_bco_weight") or 0)
    why = "bco_pair here has no running mean of rewards; see its delta" if weight else ""
    draft.settle(Fate.CHANGED if weight else Fate.TAKEN, "pref_bco_weight", why=why)
    both = [loss, {"loss_type": "bco_pair", "beta": beta}]
    return weighted(both, [1 / (1 + weight), weight / (1 + weight)]) if weight else loss


def _tuning(draft: Draft) -> None:
    kind = draft.value("finetuning_type")
    trained = kind in ("lora", "oft")
    hf.adapter(draft, trained, LORA_KEYS)
    why = {
        "freeze": "name what stays as it is in model.freeze; the layers are not taken over",
        "oft": "LoRA is the only kind of adapter",
    }
    draft.settle(Fate.CHANGED if kind in why else Fate.TAKEN, "finetuning_type", why=why.get(kind, ""))
    bits = draft.value("quantization_bit")
    if not trained:
        return
    rank = int(draft.value("lora_rank"))
    draft.take("peft.lora_r", rank, "lora_rank")
    draft.take("peft.lora_alpha", int(draft.value("lora_alpha") or 2 * rank), "lora_alpha")
    targets = as_list(draft.value("lora_target"))
    draft.take("peft.lora_target_modules", "all-linear" if targets == ["all"] else targets, "lora_target")
    extra = as_list(draft.value("additional_target"))
    if extra:
        draft.take("peft.lora_modules_to_save", extra, "additional_target")
    if bits in (4, 8):
        draft.take(f"peft.load_in_{bits}bit", True, "quantization_bit")
        hf.nested_quantisation(draft, "double_quantization")
    else:
        draft.settle(Fate.LOST, "quantization_bit", why="4 or 8 bits, by bitsandbytes")


def _data(draft: Draft, held_out: bool) -> None:
    paths = [_look_up(draft, name) for name in as_list(draft.value("dataset"))]
    names = ("dataset", "dataset_dir")
    if len(paths) == 1:
        for key, value in paths[0].items():
            ours = {"path": "dataset_name", "name": "dataset_config", "split": "dataset_train_split"}
            draft.take(f"data.{ours[key]}", value, *names)
    elif paths:
        draft.take("data.datasets", paths, *names)
    if held_out and draft.value("eval_dataset"):
        draft.settle(Fate.CHANGED, "eval_dataset", why="a held-out split of a data set, not another data set")
        draft.by_hand.append(
            "data.dataset_test_split: put the rows of eval_dataset beside the training split"
        )
    elif not held_out:
        draft.settle(Fate.TAKEN, "eval_dataset", "val_size")


def _look_up(draft: Draft, name: str) -> dict[str, str]:
    """The part of `data.datasets` for a name in `dataset_info.json`, or for a path."""
    folder = draft.folder / str(draft.value("dataset_dir") or "data")
    index = folder / "dataset_info.json"
    entry = json.loads(index.read_text(encoding="utf-8")).get(name, {}) if index.is_file() else {}
    path = entry.get("hf_hub_url") or (entry.get("file_name") and str(folder / entry["file_name"]))
    if path is None:
        draft.by_hand.append(
            f"data.dataset_name: {name} is a name in LLaMA-Factory's dataset_info.json; write its hf_hub_url "
            "or the path of its rows as .jsonl, and look at them with madpo show-data"
        )
        return {"path": name}
    if not entry.get("hf_hub_url") and not path.endswith((".jsonl", ".parquet")):
        draft.by_hand.append(f"{path}: write its rows into a .jsonl or .parquet file")
    found = {"path": path, "name": entry.get("subset"), "split": entry.get("split")}
    return {key: value for key, value in found.items() if value}


def _stage(given: Mapping[str, Any], program: str) -> str | None:
    stage = str(given.get("stage", "sft"))
    stages = {"sft": "sft", "pt": "sft", "rm": "reward", "dpo": "dpo", "kto": "kto"}
    if stage not in stages:
        raise UserError(f"stage: {stage}: madpo has no on-policy RL; sft, pt, rm, dpo and kto are converted")
    return stages[stage]


def _defaults(task: str) -> dict[str, Any]:
    return {
        **hf.DEFAULTS,
        "finetuning_type": "lora",
        "cutoff_len": 2048,
        "pref_loss": "sigmoid",
        "pref_beta": 0.1,
        "simpo_gamma": 0.5,
        "kto_chosen_weight": 1.0,
        "kto_rejected_weight": 1.0,
        "lora_rank": 8,
        "lora_target": "all",
        "disable_gradient_checkpointing": False,
    }


TOGETHER = """
    stage cutoff_len dataset dataset_dir eval_dataset finetuning_type pure_bf16 pref_ftx pref_bco_weight
"""
RULES: dict[str, Rule] = {
    **hf.RULES,
    **each(TOGETHER, with_others),
    **each(" ".join([*LOSS_KEYS, *LORA_KEYS]), with_others),
    **plain("preprocessing_num_workers", "ref_model", "enable_liger_kernel", "moe_aux_loss_coef"),
    **plain("resize_vocab", "streaming", "use_rslora", "use_dora"),
    "deepspeed": deepspeed_block,
    "quantization_type": to("peft.bnb_4bit_quant_type"),
    "disable_gradient_checkpointing": to("model.gradient_checkpointing", lambda off: not off),
    "disable_shuffling": to("data.order", lambda off: "as_is" if off else "shuffled"),
    "flash_attn": to("model.attention", lambda name: "sdpa" if name in ("sdpa", "disabled") else "auto"),
    "cache_dir": not_needed,
    "mask_history": only(True, why="the last message is trained on", fate=Fate.CHANGED),
    "train_on_prompt": only(False, why="completions are trained on, prompts never"),
    "neat_packing": not_needed,
    "packing": not_needed,
    "plot_loss": not_needed,
    "overwrite_cache": not_needed,
    "enable_thinking": to("data.chat_template_kwargs", lambda value: {"enable_thinking": bool(value)}),
    "tokenized_path": changed("tokenised data is kept in data.cache_dir"),
    "quantization_method": only("bnb", "bitsandbytes", why="4 or 8 bits, by bitsandbytes"),
    "loraplus_lr_ratio": lost("both matrices of an adapter have optim.lr"),
    "pissa_init": only(False, why="an adapter starts at zero, so that the policy starts as the reference"),
    "rope_scaling": lost("write it into the config.json of the model"),
    "use_unsloth": only(False, why="madpo's own kernels are used"),
    "compute_accuracy": only(False, why="rewards/accuracies is logged for pairs"),
    "adapter_name_or_path": lost(
        "a stored adapter is trained on if model.model_name_or_path names it; leave the section peft out"
    ),
    "default_system": lost("write it into the rows"),
    "upcast_layernorm": only(False, why="the type of the weights is that of train.bf16"),
    **otherwise("template"),
    **missing("max_samples", "val_size"),
    **each(
        """
        preprocessing_batch_size use_fast_tokenizer low_cpu_mem_usage ignore_pad_token_for_loss
        split_special_tokens use_reentrant_gc mix_strategy data_shared_file_system
        """,
        not_needed,
    ),
    **each(
        """
        use_galore use_badam use_apollo use_adam_mini use_muon use_llama_pro shift_attn
        """,
        only(False, why="AdamW on the weights themselves is the only way"),
    ),
    **each(
        """
        use_swanlab swanlab_project swanlab_run_name
        """,
        only(False, why=TRACKERS),
    ),
}

LLAMA_FACTORY = Peer("LLaMA-Factory", RULES, _together, _defaults, _stage, hf.ALIASES)
