"""Losses of pairs by TRL's names, which LLaMA-Factory and Axolotl use too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from madpo.launch.convert.draft import FILL_IN, Draft, Fate

SMOOTHED = "TRL before 1.0 meant cDPO by it; later versions ignore it with sigmoid"
NLL_OF_TRL = "the NLL is a mean over pairs here; TRL's is over the tokens of a micro-batch"
KL_OF_TRL = "KTO's estimate of the KL is over the global batch here, over the batch of a device there"
ORPO_OF_TRL = "ORPO's NLL is over the completion here, over prompt and completion in TRL"

WITH_BETA_ALONE = (
    *("hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "sigmoid_norm", "wpo"),
)
OTHER_NAMES = {"dpo": "sigmoid", "dpo_norm": "sigmoid_norm", "aot_pair": "aot"}
"""Names of open-instruct and of older TRLs -> TRL's."""


def loss_of_pairs(
    draft: Draft,
    kind: str,
    beta: float,
    smoothing: float = 0.0,
    further: dict[str, Any] | None = None,  # other keys of DPOConfig that change the loss
) -> dict[str, Any]:
    """The loss that one of DPOTrainer's names stands for, with its parameters."""
    kind, further = OTHER_NAMES.get(kind, kind), further or {}
    if kind == "sigmoid":
        return _sigmoid(beta, smoothing, further)
    if kind == "exo_pair":
        return {"loss_type": kind, "beta": beta, "eps": smoothing or 1e-3}
    if kind == "discopop":
        return {"loss_type": kind, "beta": beta, "tau": float(further.get("discopop_tau") or 0.05)}
    if kind in ("robust", "aot", "aot_unpaired"):
        return {"loss_type": kind, "beta": beta, "label_smoothing": smoothing}
    if kind == "sft":
        return {"loss_type": "chosen_nll"}
    return {"loss_type": kind, "beta": beta} if kind in WITH_BETA_ALONE else no_such_loss(draft, kind)


def _sigmoid(beta: float, smoothing: float, further: dict[str, Any]) -> dict[str, Any]:
    """DPO's loss, or the one that a further key makes of it."""
    divergence = str(further.get("f_divergence_type") or "reverse_kl").removesuffix("_divergence")
    if divergence == "alpha":
        alpha = float(further.get("f_alpha_divergence_coef") or 0.5)
        return {"loss_type": "f_dpo", "beta": beta, "divergence": divergence, "alpha": alpha}
    if divergence != "reverse_kl":
        return {"loss_type": "f_dpo", "beta": beta, "divergence": divergence}
    if further.get("use_weighting"):
        return {"loss_type": "wpo", "beta": beta, "clamp": False}
    if further.get("ld_alpha") is not None:
        return {"loss_type": "ld_dpo", "beta": beta, "alpha": float(further["ld_alpha"])}
    if smoothing:
        return {"loss_type": "cdpo", "beta": beta, "label_smoothing": smoothing}
    return {"loss_type": "dpo", "beta": beta}


def simpo(beta: float, gamma: float, nll: float = 0.0, alpha: float = 0.0) -> dict[str, Any]:
    """SimPO, with the NLL of the chosen completion, or with AlphaPO's curve."""
    if nll:
        return {"loss_type": "cpo_simpo", "beta": beta, "gamma": gamma, "alpha": nll}
    if alpha:
        return {"loss_type": "alphapo", "beta": beta, "gamma": gamma, "alpha": alpha}
    return {"loss_type": "simpo", "beta": beta, "gamma": gamma}


def weighted(losses: list[dict[str, Any]], weights: Sequence[float] | None) -> dict[str, Any]:
    """One loss of several, with weights, or all with weight 1."""
    if len(losses) == 1:
        return losses[0]
    numbers = [float(weight) for weight in weights or [1.0] * len(losses)]
    return {"loss_type": "weighted_sum", "terms": losses, "loss_weights": numbers}


def add_nll(draft: Draft, loss: dict[str, Any], name: str, why: str = "") -> dict[str, Any]:
    """The loss, and the chosen completion's NLL with the weight that the file's key `name` gives, if any."""
    weight = float(draft.value(name) or 0)
    draft.settle(Fate.CHANGED if weight and why else Fate.TAKEN, name, why=why if weight else "")
    if not weight:
        return loss
    if loss["loss_type"] == "dpo":
        return {**loss, "loss_type": "dpo_nll", "alpha": weight}
    return weighted([loss, {"loss_type": "chosen_nll"}], [1.0, weight])


def no_such_loss(draft: Draft, loss: str) -> dict[str, Any]:
    """The marker for a loss that has no counterpart; no run starts with it."""
    draft.by_hand.append(f"objective.loss_type: {loss} has no counterpart; docs/objectives.md lists all")
    return {"loss_type": FILL_IN}


OF_THE_LOSS = ("loss_type", "terms")
"""Parameters that name losses."""


def set_objective(draft: Draft, loss: dict[str, Any], *names: str) -> None:
    """Set the loss and its parameters to what the file's keys `names` say together."""
    for key, value in loss.items():
        draft.take(f"objective.{key}", value, *names)
        word = "loss" if key in OF_THE_LOSS else key
        named = [draft.spelling.get(name, name) for name in names if word in name and name in draft.given]
        otherwise = f"task {draft.task}" if key in OF_THE_LOSS else f"default of {draft.peer}"
        draft.origins[f"objective.{key}"] = ", ".join(named) or otherwise
