"""The DeepSpeed engine: its configuration, made from ours, and the calls that a run needs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, Generic

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import TypeVar

from madpo.kernels.token_scores import TokenScores
from madpo.trainer.batches.packing import PackedBatch
from madpo.trainer.config.deepspeed import zero_stage
from madpo.trainer.config.schema import Config
from madpo.trainer.config.train import OptimConfig
from madpo.trainer.errors import CheckpointError
from madpo.trainer.masking import masked
from madpo.trainer.scoring_module import Gradients, Mode, ScoredLoss, ScoringModule
from madpo.trainer.waiting import count_waits
from madpo.trainer.zero3.module_order import own_module_order
from madpo.trainer.zero3.parameters import real_shape, real_size
from madpo.trainer.zero3.release import forget_copies, release
from madpo.trainer.zero3.restore import restore
from madpo.trainer.zero3.shard_files import ShardFiles
from madpo.trainer.zero3.shards import Shards

Item = TypeVar("Item")
ModuleT = TypeVar("ModuleT", covariant=True, default=ScoringModule)


def deepspeed_config(config: Config, training: bool = True) -> dict[str, Any]:
    """DeepSpeed's configuration, made from ours. The user's `deepspeed` block adds to it or replaces."""
    ranks = dist.get_world_size()
    zero = {
        "stage": zero_stage(config.deepspeed, ranks),
        "contiguous_gradients": True,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    user = masked(config.deepspeed)  # DeepSpeed writes it into every shard, and needs no secret
    zero |= user.pop("zero_optimization", {})
    # A single rank has no communication to overlap; but stage 3 also overlaps copies from and to the host.
    zero.setdefault("overlap_comm", torch.cuda.is_available() and (ranks > 1 or zero["stage"] == 3))
    if not training and zero["stage"] < 3:
        zero["stage"] = 0  # no optimiser to shard, and DeepSpeed refuses to
    out: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: micro-batches are packed to a budget
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.max_grad_norm,
        "steps_per_print": 10**9,
        "bf16": {"enabled": config.train.bf16},
        # Gradients of micro-batches are summed in fp32; DeepSpeed would sum them in the model's dtype.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        **user,
    }
    if training:
        out["optimizer"] = {
            "type": "AdamW",
            "params": {
                "lr": config.optim.lr,
                "betas": [config.optim.adam_beta1, config.optim.adam_beta2],
                "eps": config.optim.adam_epsilon,
                "weight_decay": config.optim.weight_decay,
                # torch's own AdamW compiles nothing and resumes bit for bit; fused, it goes through the
                # weights once, which on a CPU takes a quarter of the time.
                "torch_adam": True,
                "fused": True,
            },
        }
    return out


def parameter_groups(module: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """The trainable parameters: matrices with weight decay, vectors (norms, biases) without."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    is_matrix = [len(real_shape(parameter)) > 1 for parameter in trainable]
    groups = [
        {
            "params": [p for p, matrix in zip(trainable, is_matrix, strict=True) if matrix is wanted],
            "weight_decay": decay,
        }
        for wanted, decay in ((True, optim.weight_decay), (False, 0.0))
    ]
    return [group for group in groups if group["params"]]


class Engine(Generic[ModuleT]):
    """A DeepSpeed engine around a module: the only place that talks to DeepSpeed during a run.

    The module is a `ScoringModule`, except where a model only samples and the engine is never called.
    """

    def __init__(self, config: Config, module: ModuleT, training: bool = True) -> None:
        """Wrap the module, on all ranks. Without `training` the engine has no optimiser."""
        import deepspeed
        from deepspeed.utils import logger

        if dist.get_world_size() > 1:
            count_waits(deepspeed.comm.comm.cdb)
        logger.setLevel(logging.ERROR)
        assert isinstance(module, nn.Module)
        groups: Any = parameter_groups(module, config.optim) if training else None
        with redirect_stdout(StringIO()):  # DeepSpeed prints memory sizes, in bf16 without stage 3
            engine, *_ = deepspeed.initialize(
                model=module,
                config=deepspeed_config(config, training),
                model_parameters=groups,
            )
        engine.checkpoint_engine = ShardFiles(in_background=False)  # which unpickles nothing unsafe
        # A script for other checkpoints than ours, which would lie beside the shards.
        vars(engine)["_copy_recovery_script"] = lambda _: None
        self.deepspeed: Any = engine
        self.module: ModuleT = module

    @property
    def device(self) -> torch.device:
        return self.deepspeed.device

    def __call__(self, batch: PackedBatch, mode: Mode = Mode.LOSS, gradients: Gradients = None) -> ScoredLoss:
        """Run a forward pass of a batch on the engine's device; `mode` says what it computes."""
        loss, *tokens = self.deepspeed(batch, mode, gradients)
        return ScoredLoss(loss, TokenScores(*tokens))

    def backward(self, loss: Tensor) -> None:
        self.deepspeed.backward(loss)

    def accumulate(self, items: Sequence[Item]) -> Iterator[Item]:
        """Iterate over a step's micro-batches, and tell DeepSpeed which one is the last before the update."""
        for index, item in enumerate(items):
            self.deepspeed.set_gradient_accumulation_boundary(index == len(items) - 1)
            yield item

    def step(self, learning_rate: float) -> bool:
        """Update the weights with the gradients accumulated so far.

        Returns, on all ranks, whether it did: nothing changes if the gradient is not finite on one of them.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        self.deepspeed.step()
        return self.deepspeed.was_step_applied()

    @property
    def grad_norm(self) -> float | Tensor:
        """The norm of the last step's gradient over all ranks, before clipping; may be on the device."""
        return self.deepspeed.get_global_grad_norm()

    def own_module_order(self, kind: str) -> AbstractContextManager[None]:
        """Let ZeRO-3 follow a module order of its own for this `kind` of pass, while inside."""
        return own_module_order(self.deepspeed, kind)

    def write_with(self, files: ShardFiles) -> None:
        """Have `save` write through this object."""
        self.deepspeed.checkpoint_engine = files

    def save(self, root: Path, tag: str, with_frozen: bool) -> None:
        """Write weights and optimiser into `root / tag`, on all ranks; frozen weights only if asked."""
        self.deepspeed.save_checkpoint(
            str(root), tag=tag, save_latest=False, exclude_frozen_parameters=not with_frozen
        )

    def state_bytes(self, with_frozen: bool) -> int:
        """How many bytes `save` writes on all ranks together, but for headers."""
        parameters = list(self.deepspeed.module.parameters())
        frozen = sum(real_size(p) * p.element_size() for p in parameters if not p.requires_grad)
        # Master weight and two moments in fp32; below stage 3 also the weight in its own type.
        below = self.deepspeed.zero_optimization_stage() < 3
        trained = sum(real_size(p) * (12 + below * p.element_size()) for p in parameters if p.requires_grad)
        return trained + with_frozen * frozen

    def load(self, folder: Path, files: Sequence[str], ranks: int, stage: int) -> None:
        """Restore weights and optimiser from a checkpoint's files, which `ranks` wrote in that ZeRO `stage`.

        Raises CheckpointError if they are of another model, or cannot be loaded on other ranks.
        """
        if self.deepspeed.zero_nvme_offload_optimizer():
            self._load_natively(folder, ranks, stage)
        else:
            restore(self.deepspeed, Shards(folder, files, ranks, stage))
        forget_copies(self.deepspeed.module)

    def _load_natively(self, folder: Path, ranks: int, stage: int) -> None:
        """Have DeepSpeed load its own shards: it alone knows what an optimiser has on a disk."""
        own_ranks, own_stage = dist.get_world_size(), self.deepspeed.zero_optimization_stage()
        if (ranks, stage) != (own_ranks, own_stage):
            raise CheckpointError(
                f"{folder}: written by {ranks} ranks in ZeRO stage {stage}; an optimiser that is offloaded "
                f"to NVMe continues only so, and these are {own_ranks} in stage {own_stage}"
            )
        self.deepspeed.load_checkpoint(
            str(folder.parent),
            tag=folder.name,
            load_module_strict=False,  # a reference that never moves is not in the checkpoint
            load_lr_scheduler_states=False,
        )

    def train(self) -> None:
        self.deepspeed.train()

    def eval(self) -> None:
        self.deepspeed.eval()

    def release(self) -> None:
        """Free weights and optimiser. The engine cannot be used afterwards."""
        release(self.deepspeed)
