"""The processes of a contender, which train a block of steps at a time.

    contender = Contender.start(job)
    block = contender.run_block()
    contender.stop()

Ours run `loop.train`, TRL's its DPOTrainer's `train`; both wait between blocks while others run theirs.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.multiprocessing as mp

from madpo.benchmarks.step.pair_source import Packing
from madpo.benchmarks.step.workload import Workload, fresh_adapter
from madpo.trainer.dist import free_port

START_SECONDS = 600.0
BETA = 0.1


@dataclass(frozen=True)
class Job:
    """The task of all processes of one contender."""

    trainer: str  # madpo or TRL
    workload: Workload
    ranks: int
    threads: int  # of each rank, on a CPU
    global_batch_size: int  # pairs
    steps: int  # in all
    block: int  # steps between two stops
    bf16: bool
    lr: float
    lora: bool  # whether an adapter is trained in place of all weights
    cached: bool = False  # whether the reference is scored once, before the first block
    batch_size: int = 1  # TRL's per_device_train_batch_size
    overrides: tuple[str, ...] = ()  # of our config; this and what follows is for our trainer
    packing: Packing = "balanced"
    one_traversal: bool = True  # of an adapter's policy and reference
    may_fail: bool = False  # `overrides` are the user's, so an error is a result


class Block(NamedTuple):
    """Measurements of one block, of a rank or of all ranks."""

    seconds: float
    cpu_seconds: float  # steadier than `seconds` on a busy machine
    loss: float  # mean over the block's steps; TRL's ranks know only their own pairs
    peak_bytes: int  # GPU: allocated in the block; CPU: resident so far, beyond the imports


class Gate:
    """A rank's end of the pipe, where it waits for the next block."""

    def __init__(self, pipe: Connection, device: torch.device) -> None:
        self._pipe, self._device = pipe, device
        self._imports = resident("VmRSS")

    def open(self) -> None:
        """Report that the model is ready, and wait for the first block."""
        self._pipe.send(None)
        self._wait()

    def close_block(self, loss: Callable[[], float], peak_bytes: float | None = None) -> None:
        """Report the block, and wait for the next. `loss` is called after the clock has stopped.

        `peak_bytes` is for a trainer that resets torch's peak within the block, on a GPU.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._started
        cpu_seconds = time.process_time() - self._cpu_started
        self._pipe.send(Block(seconds, cpu_seconds, loss(), self._peak(peak_bytes)))
        self._wait()

    def _wait(self) -> None:
        self._pipe.recv()  # raises EOFError when the contender is stopped
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._started, self._cpu_started = time.perf_counter(), time.process_time()

    def _peak(self, counted: float | None) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated() if counted is None else int(counted)
        return resident("VmHWM") - self._imports


def resident(field: str) -> int:
    """Bytes of memory this process has (VmRSS) or had at most (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """Reset VmHWM to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


@dataclass
class Contender:
    """The ranks of a contender, as the benchmark's process sees them."""

    processes: Sequence[Any]
    pipes: Sequence[Connection]

    @classmethod
    def start(cls, job: Job) -> Self:
        """Start the ranks and wait until all are ready. Raises RuntimeError with a failed one's trace."""
        context, port = mp.get_context("spawn"), free_port()
        processes, pipes = [], []
        for rank in range(job.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(job, rank, port, theirs), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        contender = cls(processes, pipes)
        contender._answers(START_SECONDS)
        return contender

    def run_block(self, timeout: float = 3600.0) -> Block:
        """Run a block: the slowest rank's time, all CPU time, the mean of losses, the largest peak."""
        for pipe in self.pipes:
            pipe.send("go")
        seconds, cpu, losses, peaks = zip(*self._answers(timeout), strict=True)
        return Block(max(seconds), sum(cpu), sum(losses) / len(losses), max(peaks))

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()

    def _answers(self, timeout: float) -> list[Any]:
        answers = []
        for pipe in self.pipes:
            try:
                answer = pipe.recv() if pipe.poll(timeout) else "no answer in time"
            except EOFError:
                answer = "a rank died without a word"
            if isinstance(answer, str):
                self.stop()
                raise RuntimeError(answer)
            answers.append(answer)
        return answers


def _rank(job: Job, rank: int, port: int, pipe: Connection) -> None:
    if job.ranks > 1:  # a single process must not have these, or accelerate wraps its model in DDP
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(job.ranks),
            LOCAL_WORLD_SIZE=str(job.ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    torch.set_num_threads(job.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed and TRL give some at every step
    from tqdm import tqdm
    from transformers.utils import logging

    logging.disable_progress_bar()
    tqdm.set_lock(threading.RLock())  # not one between processes, which would outlive this one
    try:
        (run_trl if job.trainer == "TRL" else run_madpo)(job, pipe)
        pipe.recv()
    except (EOFError, BrokenPipeError):  # the contender was stopped
        pass
    except BaseException:
        pipe.send(traceback.format_exc())
    os._exit(0)  # other ranks may be gone: a clean exit would wait for them


def run_madpo(job: Job, pipe: Connection) -> None:
    from madpo.benchmarks.step.pair_source import PairSource
    from madpo.trainer import dist
    from madpo.trainer.config.schema import from_tree
    from madpo.trainer.config.strict_yaml import override
    from madpo.trainer.data.groups import with_logps
    from madpo.trainer.loop import Unsaved, train
    from madpo.trainer.model.tokenizer import load_tokenizer
    from madpo.trainer.reference.cached import score_once
    from madpo.trainer.stages.start_engine import start_engine
    from madpo.trainer.state import TrainState
    from madpo.trainer.throughput import MEMORY

    tree: dict[str, Any] = {
        "output_dir": job.workload.folder,
        "model": {
            "model_name_or_path": job.workload.model,
            "reference": "cached" if job.cached else "auto",
        },
        "data": {"dataset_name": job.workload.data, "max_length": job.workload.max_length},
        "objective": {"loss_type": "dpo", "beta": BETA},
        "optim": {"lr": job.lr, "lr_scheduler_type": "constant"},
        "train": {
            "global_batch_size": job.global_batch_size,
            "max_steps": job.steps,
            "logging_steps": job.block,
            "bf16": job.bf16,
        },
    }
    if job.lora:
        tree["peft"] = {}
    config = from_tree(override(tree, job.overrides), "benchmark")
    shard, device = dist.init(10.0), dist.device()
    gate = Gate(pipe, device)
    tokenizer = load_tokenizer(config.model)
    source = PairSource(job.workload.pairs(), job.packing, config.train.micro_batch_tokens)
    if job.cached:
        source.groups = with_logps(source.groups, score_once(config, source.groups, tokenizer, shard))
    engine = start_engine(config, tokenizer, training=True)
    if not job.one_traversal:
        module: Any = engine.module
        module.interleaved = None
    gate.open()
    train(
        config,
        engine,
        source,
        None,
        shard,
        TrainState(),
        Unsaved(),
        on_record=lambda record: gate.close_block(lambda: record["loss"], record[MEMORY] * 2**30),
    )


def run_trl(job: Job, pipe: Connection) -> None:
    """Train with TRL's DPOTrainer on the same tokens in order; several ranks with ZeRO-3."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl.trainer.dpo_config import DPOConfig  # pyright: ignore[reportMissingImports]
    from trl.trainer.dpo_trainer import DPOTrainer  # pyright: ignore[reportMissingImports]

    from madpo.trainer import dist

    if job.ranks > 1:
        dist.init(10.0)
    device = dist.device()
    gate = Gate(pipe, device)
    arguments = DPOConfig(**trl_arguments(job, device))
    losses: list[torch.Tensor] = []

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
            return dataset  # already tokens

        def compute_loss(self, *inputs: Any, **options: Any) -> Any:
            loss = super().compute_loss(*inputs, **options)
            losses.append(loss.detach())
            return loss

    class Turns(TrainerCallback):
        def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
            assert not model.is_activation_checkpointing
            assert job.ranks > 1 or trainer.model_wrapped is trainer.model
            gate.open()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % job.block == 0:
                gate.close_block(lambda: float(torch.stack(losses).mean()))
                losses.clear()

    tokenizer = AutoTokenizer.from_pretrained(job.workload.model)
    trainer = Trainer(
        job.workload.model,
        args=arguments,
        train_dataset=Dataset.load_from_disk(job.workload.data),
        processing_class=tokenizer,
        callbacks=[Turns()],
        peft_config=fresh_adapter(job.workload) if job.lora else None,
    )
    trainer.train()


def trl_arguments(job: Job, device: torch.device) -> dict[str, Any]:
    """DPOTrainer's fastest settings for the same loss: no logging, no checkpoints, no recomputation."""
    out: dict[str, Any] = {
        "output_dir": str(Path(job.workload.folder) / "trl"),
        "per_device_train_batch_size": job.batch_size,
        "gradient_accumulation_steps": job.global_batch_size // (job.batch_size * job.ranks),
        "max_steps": job.steps,
        "max_length": job.workload.max_length,
        "beta": BETA,
        "precompute_ref_log_probs": job.cached,
        "learning_rate": job.lr,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "train_sampling_strategy": "sequential",
        "activation_checkpointing": False,
        "bf16": job.bf16,
        "use_cpu": device.type == "cpu",
        "model_init_kwargs": {
            # Weights that are trained are in float32, by DeepSpeed's copies or under autocast.
            "dtype": "bfloat16" if job.bf16 and (job.ranks > 1 or job.lora) else "float32",
            "device_map": None,  # the default may put part of a model on the host
        },
        "logging_strategy": "no",
        "save_strategy": "no",
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": "none",
    }
    if job.ranks > 1:
        out["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": job.bf16},
            "zero_optimization": {
                "stage": 3,
                "overlap_comm": device.type == "cuda",
                "contiguous_gradients": True,
            },
        }
    return out
