"""The config's sections `optim` and `train`: the optimiser, the steps and what is kept of them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from madpo.trainer.config.section import Effect, Section, setting


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
    micro_batch_tokens: int = setting(
        default=16384, ge=2, description="packed tokens per forward and rank", effect=Effect.PACKED_ROWS
    )
    sequence_parallel_size: int = Field(
        default=1, ge=1, description="ranks that share a packed row, for long ones; divides the model's heads"
    )
    num_train_epochs: float = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1, description="in place of num_train_epochs")
    bf16: bool = True
    logging_steps: int = setting(default=10, ge=1, effect=Effect.RESULT)
    eval_steps: int | None = setting(
        default=None, ge=1, description="null: only at the end", effect=Effect.RESULT
    )
    save_steps: int | None = setting(
        default=None, ge=1, description="null: only at the end", effect=Effect.MEANS
    )
    save_total_limit: int = setting(default=2, ge=1, description="checkpoints kept", effect=Effect.MEANS)
    export: bool = setting(
        default=True, description="write a Hugging Face model folder at the end", effect=Effect.RESULT
    )
    export_merged: bool = setting(
        default=False,
        description="beside an adapter, also write whole weights with it in them",
        effect=Effect.RESULT,
    )
    max_shard_size: str = setting(
        default="5GB",
        pattern=r"^[1-9][0-9]*(KB|MB|GB)$",
        description="of an exported weights file",
        effect=Effect.RESULT,
    )
    head_gib: float = setting(
        default=2.0, gt=0, description="GiB of logits that the loss head keeps at once", effect=Effect.MEANS
    )
    head_impl: Literal["auto", "triton", "torch"] = setting(
        default="auto",
        description="of the loss head; auto: triton on GPUs, torch on CPUs",
        effect=Effect.MEANS,
    )
    peak_tflops: float | None = setting(
        default=None,
        gt=0,
        description="of one device, for perf/mfu; null: of common GPUs it is known",
        effect=Effect.RESULT,
    )

    @property
    def row_tokens(self) -> int:
        """The most that a packed row may hold."""
        return self.micro_batch_tokens * self.sequence_parallel_size
