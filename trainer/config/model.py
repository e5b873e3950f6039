"""The config's section `model`: weights, reference, attention, what is frozen."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from madpo.trainer.config.section import Effect, Section, setting


class ModelConfig(Section):
    model_name_or_path: str | None = setting(
        default=None, description="weights to start from: folder or hub name", names="path"
    )
    model_revision: str | None = None
    init_config: dict[str, Any] | None = Field(
        default=None, description="build from scratch instead: `model_type` and that family's config values"
    )
    ref_model_name_or_path: str | None = setting(
        default=None,
        description="frozen reference; null is the model that training starts from",
        names="path",
    )
    reference: Literal["auto", "joint", "cached", "adapter", "none"] = Field(
        default="auto",
        description="joint: a model beside the policy; adapter: the policy without its adapter; cached: "
        "scored once, before training; auto: none, adapter or joint, by objective and model",
    )
    sync_ref_model: bool = Field(default=False, description="move the reference towards the policy (TR-DPO)")
    ref_model_mixup_alpha: float = Field(default=0.6, gt=0, le=1, description="share of the policy in a move")
    ref_model_sync_steps: int = Field(default=512, ge=1, description="optimiser steps between moves")
    tokenizer_name_or_path: str | None = setting(
        default=None, description="null: beside the model", names="path"
    )
    attention: Literal["auto", "flash", "torch", "flex", "sdpa"] = setting(
        default="auto",
        description="kernel of the packed attention; auto: the fastest that computes this model's",
        effect=Effect.MEANS,
    )
    prefix_sharing: bool = setting(
        default=True,
        description="compute a prompt once for all its completions, not once for each",
        effect=Effect.PACKED_ROWS,
    )
    gradient_checkpointing: bool | Literal["selective"] = setting(
        default=False,
        description="recompute activations in backward; selective: all but matrix products and attention",
        effect=Effect.MEANS,
    )
    activation_offloading: bool = setting(
        default=False,
        description="saved activations wait for the backward pass in host memory",
        effect=Effect.MEANS,
    )
    use_liger_kernel: bool = setting(
        default=False,
        description="Liger's kernels for norms, MLPs and rotary embeddings; needs liger-kernel",
        effect=Effect.MEANS,
    )
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
