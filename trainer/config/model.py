"""The config's section `model`: weights, reference, attention, what is frozen."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from madpo.trainer.config.section import Effect, Section, setting


class ModelConfig(Section):
    model_name_or_path: str | None = setting(
        default=None, description="model to start from: a folder, a run, or a hub name", names="path"
    )
    model_revision: str | None = Field(
        default=None, description="branch, tag or commit of the model on the hub"
    )
    init_config: dict[str, Any] | None = Field(
        default=None,
        description="model with random weights instead: `model_type` and config values of that family",
    )
    ref_model_name_or_path: str | None = setting(
        default=None,
        description="frozen reference model: a folder, a run, or a hub name; null: the model to start from",
        names="path",
    )
    reference: Literal["auto", "joint", "cached", "adapter", "none"] = Field(
        default="auto",
        description="how the reference is computed; joint: a second model beside the policy; adapter: the "
        "policy without its adapter; cached: once, before training; auto: none, adapter or joint, by "
        "objective and model",
    )
    sync_ref_model: bool = Field(default=False, description="move the reference towards the policy (TR-DPO)")
    ref_model_mixup_alpha: float = Field(
        default=0.6, gt=0, le=1, description="share of the policy in each move of the reference"
    )
    ref_model_sync_steps: int = Field(
        default=512, ge=1, description="optimiser steps between moves of the reference"
    )
    tokenizer_name_or_path: str | None = setting(
        default=None, description="tokenizer: a folder, a run, or a hub name; null: the model's", names="path"
    )
    attention: Literal["auto", "flash", "torch", "flex", "sdpa"] = setting(
        default="auto",
        description="kernel of the packed attention; auto: the fastest that this model's attention allows",
        effect=Effect.MEANS,
    )
    prefix_sharing: bool = setting(
        default=True,
        description="compute a prompt once for all its completions, not once for each of them",
        effect=Effect.PACKED_ROWS,
    )
    gradient_checkpointing: bool | Literal["selective"] = setting(
        default=False,
        description="recompute activations in the backward pass; selective: all except matrix products and "
        "attention",
        effect=Effect.MEANS,
    )
    activation_offloading: bool = setting(
        default=False,
        description="keep activations in host memory until the backward pass",
        effect=Effect.MEANS,
    )
    use_liger_kernel: bool = setting(
        default=False,
        description="use Liger's kernels for norms, MLPs and rotary embeddings; needs liger-kernel",
        effect=Effect.MEANS,
    )
    router_aux_loss_coef: float = Field(
        default=0.0, ge=0, description="weight of a mixture of experts' load-balancing loss; 0: off"
    )
    resize_embeddings: bool = Field(
        default=False, description="add embeddings for tokens that the tokenizer has and the model lacks"
    )
    freeze: list[str] = Field(
        default_factory=list,
        description="weights not to train: `embeddings`, `head`, or patterns of names as in *.layers.0.*",
    )
