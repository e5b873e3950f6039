"""TRL: its configs, scripts and command lines; recipes of alignment-handbook, SimPO and open-instruct too."""

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
    no_such_loss,
    set_objective,
    simpo,
    weighted,
)
from madpo.launch.convert.peer import Peer, as_list, each, otherwise, plain
from madpo.launch.convert.zero import deepspeed_block
from madpo.trainer.config.foreign_keys import REPLACED, TRACKERS

LORA_KEYS = [*hf.LORA, "lora_dropout", "lora_target_modules", "lora_task_type", "bnb_4bit_quant_storage"]
CONVERSATIONS = (
    "of a conversation, the last message is trained on; TRL trains on every token of one, unless "
    "assistant_only_loss or completion_only_loss is set"
)


def _together(draft: Draft) -> None:
    draft.take("data.max_length", int(draft.value("max_length")), "max_length")
    hf.batch(draft, "per_device_train_batch_size", "gradient_accumulation_steps", "max_length")
    hf.schedule(draft, "lr_scheduler_type", "warmup_steps", "warmup_ratio")
    hf.duration(draft, "num_train_epochs", "max_steps")
    hf.saving(draft)
    hf.precision(draft, default=True)
    _data(draft, held_out=hf.evaluating(draft))
    _model_type(draft)
    trained = draft.value("use_peft") is True
    draft.settle(Fate.TAKEN, "use_peft")
    hf.adapter(draft, trained, LORA_KEYS)
    if trained and draft.value("lora_target_modules") is None:
        draft.take("peft.lora_target_modules", ["q_proj", "v_proj"], "lora_target_modules")
        draft.remarks.append("peft.lora_target_modules: peft's choice for Llama, Mistral, Qwen and Gemma")
    _objective(draft)


def _objective(draft: Draft) -> None:
    beta = float(draft.value("beta"))
    kinds = as_list(draft.value("loss_type"))
    kind = kinds[0] if kinds else ""
    if draft.task == "sft":
        loss: dict[str, Any] = {"loss_type": "dft" if kind == "dft" else "nll"}
        draft.remarks.append(CONVERSATIONS)
    elif draft.task == "reward":
        weight = float(draft.value("center_rewards_coefficient") or 0)
        loss = {"loss_type": "bradley_terry", "center_rewards_coefficient": weight}
    elif draft.task == "kto":
        weights = {key: float(draft.value(key)) for key in ("desirable_weight", "undesirable_weight")}
        loss = {"loss_type": kind or "kto", "beta": beta, **weights}
        draft.remarks.append(KL_OF_TRL)
    elif draft.task == "orpo":
        loss = {"loss_type": "orpo", "lambda": beta}
        draft.remarks.append(ORPO_OF_TRL)
    elif draft.task in ("cpo", "simpo"):
        loss = _reference_free(draft, kind, beta)
    else:
        loss = _preference(draft, kinds or ["sigmoid"], beta)
    set_objective(draft, loss, *LOSS_KEYS[draft.task], "loss_type", "beta")


def _reference_free(draft: Draft, kind: str, beta: float) -> dict[str, Any]:
    ratio, nll = draft.value("gamma_beta_ratio"), float(draft.value("cpo_alpha"))
    gamma = float(draft.value("simpo_gamma")) if ratio is None else beta * float(ratio)
    if draft.value("label_smoothing"):
        draft.settle(Fate.LOST, "label_smoothing", why="losses without a reference have none")
    if nll:
        draft.remarks.append(NLL_OF_TRL)
    if draft.task == "simpo" or kind in ("simpo", "alphapo"):
        return simpo(beta, gamma, nll, float(draft.value("alpha") or 0))
    if kind in ("", "sigmoid"):
        return {"loss_type": "cpo", "beta": beta, "alpha": nll}
    return no_such_loss(draft, f"{kind} of CPOTrainer")


def _preference(draft: Draft, kinds: list[str], beta: float) -> dict[str, Any]:
    smoothing = float(draft.value("label_smoothing") or 0)
    further = {name: draft.value(name) for name in LOSS_KEYS["dpo"]}
    losses = [loss_of_pairs(draft, kind, beta, smoothing, further) for kind in kinds]
    if "sft" in kinds:
        draft.remarks.append(NLL_OF_TRL)
    if smoothing and "sigmoid" in kinds:
        draft.remarks.append(f"label_smoothing: {SMOOTHED}")
    return add_nll(draft, weighted(losses, draft.value("loss_weights")), "rpo_alpha", NLL_OF_TRL)


LOSS_KEYS: dict[str, tuple[str, ...]] = {
    "sft": (),
    "reward": ("center_rewards_coefficient",),
    "kto": ("desirable_weight", "undesirable_weight"),
    "orpo": (),
    "cpo": ("simpo_gamma", "gamma_beta_ratio", "cpo_alpha", "alpha"),
    "simpo": ("simpo_gamma", "gamma_beta_ratio", "cpo_alpha", "alpha"),
    "dpo": (
        *("label_smoothing", "discopop_tau", "use_weighting", "ld_alpha", "loss_weights"),
        *("f_divergence_type", "f_alpha_divergence_coef"),
    ),
}
"""Task -> the keys that decide its loss, besides `loss_type` and `beta`."""


def _data(draft: Draft, held_out: bool) -> None:
    mixture = _mixture(draft)
    names = ("datasets", "dataset_mixture", "dataset_mixer", "dataset_mixer_list", "dataset_splits")
    splits = as_list(draft.value("dataset_splits"))
    train = [split for split in splits if not split.startswith("test")]
    test = [split for split in splits if split.startswith("test")]
    if len(mixture) == 1 and mixture[0].get("fraction", 1.0) == 1.0:
        part = mixture[0]
        draft.take("data.dataset_name", part["path"], *names)
        draft.take("data.dataset_train_split", part.get("split") or (train or ["train"])[0], *names)
        if part.get("name"):
            draft.take("data.dataset_config", part["name"], *names)
        if test and held_out:
            draft.take("data.dataset_test_split", test[0], *names)
    elif mixture:
        parts = [{"path": part["path"], "split": (train or ["train"])[0], **part} for part in mixture]
        held = [{**part, "test_split": test[0]} if test and held_out else part for part in parts]
        draft.take("data.datasets", held, *names)
    else:
        for key in ("dataset_name", "dataset_config", "dataset_train_split"):
            if draft.value(key) is not None:
                draft.take(f"data.{key}", draft.value(key), key)
        if held_out:
            draft.take("data.dataset_test_split", draft.value("dataset_test_split"), "dataset_test_split")
        else:
            draft.settle(Fate.TAKEN, "dataset_test_split")
    if draft.value("test_split_size") is not None:
        draft.settle(Fate.LOST, "test_split_size", why=REPLACED["val_size"])


def _mixture(draft: Draft) -> list[dict[str, Any]]:
    """The data sets of a mixture in any of its spellings, as parts of `data.datasets`."""
    mixture = draft.value("dataset_mixture")
    parts = mixture.get("datasets", []) if isinstance(mixture, dict) else draft.value("datasets") or []
    if isinstance(mixture, dict) and mixture.get("test_split_size"):
        size, why = mixture["test_split_size"], REPLACED["val_size"]
        draft.by_hand.append(f"dataset_mixture.test_split_size={size}: {why}")
    mixer = draft.value("dataset_mixer")
    flat = as_list(draft.value("dataset_mixer_list"))
    pairs = list(mixer.items()) if isinstance(mixer, dict) else list(zip(flat[::2], flat[1::2], strict=False))
    parts = [*parts, *({"path": name, "fraction": share} for name, share in pairs)]
    return [_part(draft, part) for part in parts]


def _part(draft: Draft, part: Mapping[str, Any]) -> dict[str, Any]:
    found = {
        "path": part.get("path") or part.get("id"),
        "name": part.get("name") or part.get("config"),
        "split": part.get("split"),
        "fraction": part.get("fraction") or part.get("weight"),
    }
    fraction = float(found["fraction"] or 1.0)
    if fraction > 1 and fraction == int(fraction):
        draft.by_hand.append(f"data.datasets: {found['path']}: {int(fraction)} rows; give them as a fraction")
        fraction = 1.0
    kept = {key: value for key, value in found.items() if value is not None and key != "fraction"}
    return kept | ({"fraction": fraction} if fraction != 1.0 else {})


def _model_type(draft: Draft) -> None:
    """Note the type of the weights: they are in bfloat16 with a float32 master, or in float32."""
    fine = draft.value("dtype") in (None, "auto", "bfloat16" if draft.config["train.bf16"] else "float32")
    why = "train.bf16 decides: bfloat16 with a float32 copy in the optimiser, or float32"
    draft.settle(Fate.TAKEN if fine else Fate.CHANGED, "dtype", why="" if fine else why)


def _defaults(task: str) -> dict[str, Any]:
    rates = {"sft": 2e-5, "reward": 1e-4}
    simpo = {"loss_type": "simpo"} if task == "simpo" else {}
    return {
        **hf.DEFAULTS,
        "learning_rate": rates.get(task, 1e-6),
        "logging_steps": 10,
        "gradient_checkpointing": True,
        "max_length": 1024,
        "beta": 0.1,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
        "cpo_alpha": 0.0 if task == "simpo" else 1.0,
        "simpo_gamma": 0.5,
        "dataset_test_split": "test",
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        **simpo,
        **({"train_sampling_strategy": "sequential"} if task == "kto" else {}),
    }


OWN_KEYS = {
    "kto": ("desirable_weight", "undesirable_weight"),
    "simpo": ("gamma_beta_ratio", "simpo_gamma"),
    "cpo": ("cpo_alpha",),
    "reward": ("center_rewards_coefficient",),
    "sft": ("packing", "dataset_text_field", "completion_only_loss", "assistant_only_loss"),
    "dpo": ("precompute_ref_log_probs", "ref_model_name_or_path", "rpo_alpha", "loss_weights"),
}


PROGRAMS = {"sft": "sft", "dpo": "dpo", "kto": "kto", "reward": "reward", "cpo": "cpo", "orpo": "orpo"}
"""Command, script or config class, in small letters -> task."""


def _task_of(given: Mapping[str, Any], program: str) -> str | None:
    if program in PROGRAMS:
        return PROGRAMS[program]
    return next((task for task, keys in OWN_KEYS.items() if any(key in given for key in keys)), None)


ALIASES = {
    **hf.ALIASES,
    "max_seq_length": "max_length",
    "num_epochs": "num_train_epochs",
    "dpo_beta": "beta",
    "dpo_loss_type": "loss_type",
    "use_lora": "use_peft",
    "tokenizer_name": "tokenizer_name_or_path",
    "preprocessing_num_workers": "dataset_num_proc",
    "dataset_streaming": "streaming",
    "ref_model": "ref_model_name_or_path",
    "lora_rank": "lora_r",
}
"""Keys of older TRLs and of open-instruct -> TRL's."""

TOGETHER = """
    max_length loss_type beta rpo_alpha use_peft datasets dataset_mixture dataset_mixer
    dataset_mixer_list dataset_splits dataset_name dataset_config dataset_train_split dataset_test_split
    test_split_size dtype
"""
RULES: dict[str, Rule] = {
    **hf.RULES,
    **each(TOGETHER, with_others),
    **each(" ".join(key for keys in LOSS_KEYS.values() for key in keys), with_others),
    **hf.LORA,
    **plain("ref_model_name_or_path", "tokenizer_name_or_path", "streaming"),
    **plain("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    "deepspeed": deepspeed_block,
    "lora_target_modules": to("peft.lora_target_modules"),
    "precompute_ref_log_probs": to("model.reference", lambda given: "cached" if given else "auto"),
    "dataset_text_field": to("data.columns", lambda column: {"text": column} if column != "text" else {}),
    "checkpointing_steps": hf.steps_of("train.save_steps"),
    "use_flash_attn": not_needed,
    "gradient_checkpointing": to("model.gradient_checkpointing", bool),
    "assistant_only_loss": only(False, None, why="the last message is trained on", fate=Fate.CHANGED),
    "completion_only_loss": only(True, None, why="completions are trained on, prompts never"),
    "disable_dropout": only(True, why="dropout is refused"),
    "reference_free": only(False, why="objective simpo, cpo or orpo needs no reference"),
    "with_tracking": only(False, why=TRACKERS),
    "use_slow_tokenizer": only(False, why="the fast tokenizer is used"),
    "chat_template_path": changed("the tokenizer's own chat template is used"),
    "eos_token": lost("the tokenizer's own; or save one with another and name it in tokenizer_name_or_path"),
    "pad_token": not_needed,
    "seed": to("seed"),
    **otherwise("chat_template", "max_completion_length"),
    **each(
        """
        packing packing_strategy eval_packing padding_free precompute_ref_batch_size
        """,
        not_needed,
    ),
    **each(
        """
        generate_during_eval is_encoder_decoder
        """,
        only(False, None, why="not done here"),
    ),
    **each(
        """
        dataset_kwargs bnb_4bit_quant_storage lora_task_type
        """,
        not_needed,
    ),
}

TRL = Peer("TRL", RULES, _together, _defaults, _task_of, ALIASES)
