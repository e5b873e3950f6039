"""The config's sections `optim` and `train`: the optimiser, the steps, and what is written."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from madpo.trainer.config.section import Effect, Section, setting
from madpo.trainer.counted import counted
from madpo.trainer.errors import UserError

NOTHING_TO_EVALUATE = (
    "train.eval_steps: there is nothing to evaluate on; set data.dataset_test_split, or leave eval_steps out"
)


class OptimConfig(Section):
    lr: float = Field(default=1e-6, gt=0, description="highest learning rate, which warm-up ends at")
    weight_decay: float = Field(
        default=0.0, ge=0, description="weight decay of matrices; norms and biases have none"
    )
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW: decay of the mean of gradients")
    adam_beta2: float = Field(
        default=0.999, ge=0, lt=1, description="AdamW: decay of the mean of squared gradients"
    )
    adam_epsilon: float = Field(default=1e-8, gt=0, description="AdamW: term against division by zero")
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="norm above which gradients are clipped; 0: no clipping"
    )
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        default="cosine",
        description="schedule of the learning rate after warm-up; linear and cosine end at 0",
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="steps of warm-up, in which the learning rate rises linearly"
    )
    warmup_ratio: float = Field(
        default=0.0, ge=0, lt=1, description="share of all steps that is warm-up, instead of warmup_steps"
    )


class TrainConfig(Section):
    global_batch_size: int = Field(
        default=64, ge=1, description="groups (prompts) per optimiser step, over all ranks and micro-batches"
    )
    micro_batch_tokens: int = setting(
        default=16384,
        ge=2,
        description="most tokens of a micro-batch on one rank, packed without padding; bounds memory",
        effect=Effect.PACKED_ROWS,
    )
    sequence_parallel_size: int = Field(
        default=1,
        ge=1,
        description="ranks that share each packed row, for long sequences; divides the model's heads",
    )
    num_train_epochs: float = Field(default=1.0, gt=0, description="passes over the training data")
    max_steps: int | None = Field(
        default=None, ge=1, description="optimiser steps, instead of num_train_epochs"
    )
    bf16: bool = Field(default=True, description="train in bfloat16, else in float32")
    logging_steps: int | Literal["auto"] = setting(
        default="auto",
        description="steps between lines of metrics; auto: 10, fewer in a run of less than 200 steps",
        effect=Effect.RESULT,
    )
    eval_on_start: bool = setting(
        default=True, description="evaluate before the first step too", effect=Effect.RESULT
    )
    eval_steps: int | None = setting(
        default=None,
        ge=1,
        description="steps between evaluations on the held-out split; null: one at the end",
        effect=Effect.RESULT,
    )
    save_steps: int | Literal["auto"] | None = setting(
        default="auto",
        description="steps between checkpoints; auto: every 30 minutes; null: one at the end",
        effect=Effect.MEANS,
    )
    save_total_limit: int = setting(
        default=2, ge=1, description="number of newest checkpoints to keep", effect=Effect.MEANS
    )
    save_permanent_steps: int | None = setting(
        default=None,
        ge=1,
        description="checkpoints of every so many steps are never deleted",
        effect=Effect.MEANS,
    )
    async_save: bool = setting(
        default=False,
        description="write checkpoints while training goes on; needs host memory for one copy",
        effect=Effect.MEANS,
    )
    export: bool = setting(
        default=True, description="write a Hugging Face model folder at the end", effect=Effect.RESULT
    )
    export_merged: bool = setting(
        default=False,
        description="besides an adapter, also export the whole model with the adapter merged in",
        effect=Effect.RESULT,
    )
    max_shard_size: str = setting(
        default="5GB",
        examples=["5GB", "500MB"],
        pattern=r"^[1-9][0-9]*(KB|MB|GB)$",
        description="largest size of one exported weights file",
        effect=Effect.RESULT,
    )
    max_skipped_steps: int = setting(
        default=3,
        ge=1,
        description="steps in a row with a gradient that is not finite, each skipped, that end the run",
        effect=Effect.MEANS,
    )
    head_gib: float = setting(
        default=2.0,
        gt=0,
        description="GiB for the logits that the loss head holds at a time",
        effect=Effect.MEANS,
    )
    head_impl: Literal["auto", "triton", "torch"] = setting(
        default="auto",
        description="implementation of the loss head; auto: triton on GPUs, torch on CPUs",
        effect=Effect.MEANS,
    )
    peak_tflops: float | None = setting(
        default=None,
        gt=0,
        description="peak TFLOP/s of one device, for perf/mfu; null: looked up for common GPUs",
        effect=Effect.RESULT,
    )

    @field_validator("logging_steps", "save_steps")
    @classmethod
    def _positive(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, int) and value < 1:
            raise UserError("must be at least 1, or auto")
        return value

    @property
    def row_tokens(self) -> int:
        """The most tokens that a packed row may hold."""
        return self.micro_batch_tokens * self.sequence_parallel_size

    def idle(self, ranks: int) -> str | None:
        """How many of so many ranks a step would leave without work, for the user; None if none."""
        size, shared = self.global_batch_size, self.sequence_parallel_size
        rows = ranks // shared
        if size >= rows:
            return None
        return (
            f"train.global_batch_size: {counted(size, 'group')} a step leave {ranks - size * shared:,} "
            f"of {ranks:,} ranks without work; raise it to {rows:,} or more, or start fewer ranks"
        )
