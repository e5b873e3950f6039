"""What tests share: tiny models and data, and ranks as forked processes under DeepSpeed and gloo."""

from __future__ import annotations

import gc
import json
import logging
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from patience import patient

from madpo.trainer.config.schema import Config
from madpo.trainer.data.rated_sentences import train_tokenizer
from madpo.trainer.data.tokenise import TokenGroup

WORDS = (
    "the a one film book was is very good bad fine dull warm cold plot actor story and but not".split()  # noqa: SIM905
)


def make_tokenizer(folder: Path) -> None:
    train_tokenizer([" ".join(WORDS)] * 4, 300, folder)


def sentence(random: np.random.Generator, low: int = 2, high: int = 9) -> str:
    return " ".join(random.choice(WORDS, size=random.integers(low, high)))


def write_pairs(path: Path, count: int, seed: int = 0) -> Path:
    """Preference pairs of random words, lengths and margins."""
    random = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        rows.append(
            {
                "prompt": f"{index} {sentence(random)}:",
                "chosen": f" good {sentence(random)}",
                "rejected": f" bad {sentence(random, 2, 14)}",
                "margin": round(float(random.normal(1.0, 2.0)), 3),
            }
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": 311,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def save_model(folder: Path, tokenizer: Path, seed: int, tied: bool = False, **changes: Any) -> Path:
    """A tiny random Llama (or another model, by `changes`) with its tokenizer; large weights, so that
    models differ."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    settings = {**LLAMA, "tie_word_embeddings": tied, "initializer_range": 0.15, **changes}
    config = AutoConfig.for_model(**settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def save_classifier(folder: Path, tokenizer: Path, seed: int = 4) -> Path:
    """A tiny reward model: such a Llama with a random score layer."""
    from transformers import AutoModelForSequenceClassification

    save_model(folder, tokenizer, seed=1)
    torch.manual_seed(seed)
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(folder)
    return folder


def plain_scores(model: Any, batch: list[TokenGroup]) -> torch.Tensor:
    """(sequences,) each completion behind its prompt, alone, through transformers' classifier."""
    rows = [group.prompt + completion for group in batch for completion in group.completions]
    return torch.stack([model(input_ids=torch.tensor([row])).logits[0, 0] for row in rows])


def make_config(folder: Path, tree: dict[str, Any]) -> Config:
    """A config with test defaults: fp32, two processes, small persistent parameters partitioned."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "model": {},
        "data": {"cache_dir": str(folder / "cache"), "max_length": 64},
        "objective": {"loss_type": "dpo"},
        "optim": {"lr": 1e-3},
        "train": {
            "bf16": False,
            "global_batch_size": 8,
            "micro_batch_tokens": 256,
            "logging_steps": 1,
            "eval_on_start": False,
        },
        "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    }
    for section, values in tree.items():
        keep = isinstance(values, dict) and section != "objective"
        defaults[section] = {**defaults.get(section, {}), **values} if keep else values
    return Config.model_validate(defaults)


def without_clock(record: dict[str, Any]) -> dict[str, Any]:
    """A logged line without what no two runs have alike: time, speed, memory."""
    return {k: v for k, v in record.items() if k != "time" and not k.startswith(("perf/", "eval_perf/"))}


def random_groups(count: int, seed: int = 0, completions: int = 2, vocab: int = 300) -> list[TokenGroup]:
    random = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return random.integers(3, vocab, random.integers(low, high)).tolist()

    groups = []
    for _ in range(count):
        edges: list[tuple[int, int, float | None]] = [
            (0, i, float(random.normal())) for i in range(1, completions)
        ]
        groups.append(TokenGroup(ids(1, 12), [ids(1, 20) for _ in range(completions)], edges))
    return groups


IMPORTED_LATE = (
    "torch._inductor.compile_fx",
    "datasets.io.generator",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
)
"""What an engine's start imports where it is used: imported before the fork, no rank pays for it."""


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, checks: bool = False, timeout: float = 120
) -> list[Any]:
    """Call `function(shard, *args)` on forked gloo ranks; their results in rank order.

    Engines start there without the checks of their models, half of a start, unless `checks` asks for them.
    Raises AssertionError with the traceback of the first rank that fails, and leaves no process.
    """
    for name in IMPORTED_LATE:
        import_module(name)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    context = mp.get_context("fork")
    with own_port() as port:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            context.Process(
                target=_rank, args=(rank, world_size, port, pipes[rank][1], checks, function, args)
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            return _collect([receiver for receiver, _ in pipes], processes, patient(timeout))
        finally:
            for process in processes:
                process.join(patient(10))
                if process.is_alive():
                    process.kill()
                    process.join()


@contextmanager
def own_port() -> Iterator[int]:
    """A port that no other test, in no other process, is given at the same time: its odd neighbour is held
    for as long. Both lie below the ports that the kernel hands out."""
    first, count = 10_000, 10_000
    for attempt in range(count):
        port = first + 2 * ((os.getpid() * 37 + attempt) % count)
        with socket.socket() as claim:
            try:
                claim.bind(("127.0.0.1", port + 1))
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            yield port
            return
    raise AssertionError("no free port")


def _collect(receivers: Sequence[Connection], processes: Sequence[Any], timeout: float) -> list[Any]:
    results = []
    for rank, receiver in enumerate(receivers):
        if not receiver.poll(timeout):
            for process in processes:
                process.kill()
            raise AssertionError(f"rank {rank} gave no result in {timeout} s")
        ok, value = pickle.loads(receiver.recv_bytes())
        if not ok:
            for process in processes:
                process.kill()
            raise AssertionError(f"rank {rank} failed:\n{value}")
        results.append(value)
    return results


def _rank(
    rank: int,
    world_size: int,
    port: int,
    result: Connection,
    checks: bool,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    # The collector has nothing to find among what was there before the fork, and would copy every page of it.
    gc.freeze()
    from madpo.trainer import dist

    # torch replaces its thread pool at the first use after a fork; two of the threads that load a model
    # would do so at once, and one of them find none.
    torch.set_num_threads(1)
    try:
        if not checks:
            _leave_out_checks()
        shard = dist.init(patient(1.0))
        _send(result, True, function(shard, *args))
        dist.leave()
    except BaseException:
        _send(result, False, traceback.format_exc())
        os._exit(1)
    os._exit(0)


CHECKS = (
    ("model.startup.attention", "check_packing"),
    ("stages.start_engine", "check_head"),
    ("stages.start_engine", "check_noise"),
    ("reference.cached", "check_head"),
)
"""Where a start looks its checks up: module, name."""


def _leave_out_checks() -> None:
    """Replace the checks in this process, a rank that ends with its test."""
    for name, check in CHECKS:
        module = import_module(f"madpo.trainer.{name}")
        assert callable(getattr(module, check))
        setattr(module, check, lambda *_: None)


def _send(pipe: Connection, ok: bool, value: Any) -> None:
    """Plain pickle: multiprocessing's own would share tensors' memory, which dies with the rank."""
    pipe.send_bytes(pickle.dumps((ok, value)))
