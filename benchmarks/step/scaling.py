"""Measure how a step's time grows with the tokens of a group, and the head's memory with the pairs.

`madpo bench step --scaling` runs it, in one process and without DeepSpeed, whose share does not grow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface

from madpo.benchmarks.head import measure
from madpo.benchmarks.head import report as head_report
from madpo.benchmarks.step.report import PACKAGES
from madpo.benchmarks.step.worker import reset_peak, resident
from madpo.benchmarks.step.workload import FIRST_WORD, MODELS, make_workload
from madpo.kernels.edge_loss import EdgeLoss
from madpo.kernels.layout import GroupLayout
from madpo.kernels.preference_loss import Reference, preference_loss
from madpo.trainer.batches.packing import PackedBatch, pack
from madpo.trainer.config.schema import from_tree
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.dist import device as this_device
from madpo.trainer.model.attention.prefix_sharing import MaskRule, SegmentTable
from madpo.trainer.model.build import build_module
from madpo.trainer.model.tokenizer import load_tokenizer

GROUP_TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)
PAIRS = (4, 8, 16, 32, 64, 128)
PAIR_ROWS = 400
HEAD_BUDGET = 2**26


@dataclass(frozen=True)
class Time:
    """Time of a step on one group: a quarter of its tokens are prompt, the rest two equal completions."""

    tokens: int
    seconds: float  # forward of policy and reference, backward
    attention: float  # the part in attention, whose arithmetic grows with the square

    @property
    def others_per_token(self) -> float:
        return (self.seconds - self.attention) / self.tokens


@dataclass(frozen=True)
class Memory:
    """Memory of the loss head, in MiB."""

    pairs: int
    rows: int
    head: float  # peak beyond inputs and gradients
    all_logits: float  # size of all logits of policy and reference, computed


def times(
    folder: Path,
    model: str,
    iterations: int,
    log: Callable[[str], None],
    sizes: Sequence[int] = GROUP_TOKENS,
) -> Iterator[Time]:
    """Median times for each size. Raises UserError for an unknown model."""
    device = this_device()
    workload = make_workload(folder, model, "hh", 1, 64)
    tree: dict[str, Any] = {
        "output_dir": str(folder),
        "model": {"model_name_or_path": workload.model},
        "data": {"dataset_name": workload.data, "max_length": 64},
        "objective": {"loss_type": "dpo"},
        "train": {"bf16": device.type == "cuda"},
    }
    config = from_tree(tree, "benchmark")
    module = build_module(config, load_tokenizer(config.model)).to(device)
    module.train()
    for size in sizes:
        log(f"a group of {size} tokens")
        batch = _group(size, MODELS[model]["vocab_size"]).to(device)

        def step(batch: PackedBatch = batch) -> None:
            module(batch)[0].backward()

        attention = _attention(module.policy, batch)
        calls = {"step": step, "attention": attention}
        timings = measure.interleaved(
            calls, device, iterations, 1, lambda: module.zero_grad(set_to_none=True)
        )
        yield Time(size, timings["step"].median / 1000, timings["attention"].median / 1000)


def _group(size: int, vocab: int) -> PackedBatch:
    tokens = np.random.default_rng(size).integers(FIRST_WORD, vocab, size).tolist()
    prompt, middle = size // 4, size // 4 + (size - size // 4) // 2
    return pack([TokenGroup(tokens[:prompt], [tokens[prompt:middle], tokens[middle:]], [(0, 1, None)])])


def _attention(model: Any, batch: PackedBatch) -> Callable[[], None]:
    """A call that does all layers' attention of one step: forward for policy and reference, one backward."""
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size, width = len(batch.input_ids), config.hidden_size // heads
    leaves = [
        torch.randn(1, count, size, width, device=model.device, dtype=model.dtype).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]

    query, key, value = leaves
    attend = AttentionInterface()[config._attn_implementation]

    def causal(_: int, __: int, query: Tensor, key: Tensor) -> Tensor:
        return key <= query

    def run() -> None:
        table = SegmentTable(batch.segments)
        rule = MaskRule(causal, config)
        for _ in range(config.num_hidden_layers):
            with torch.no_grad():
                attend(None, query, key, value, rule, segments=table)
            out, _ = attend(None, query, key, value, rule, segments=table)
            out.backward(torch.ones_like(out))
            for leaf in leaves:
                leaf.grad = None

    return run


def memory(model: str, log: Callable[[str], None], counts: Sequence[int] = PAIRS) -> Iterator[Memory]:
    """Peak memory of the head alone, with HEAD_BUDGET for its logits."""
    device, config = this_device(), MODELS[model]
    for count in counts:
        log(f"the head on {count} pairs")
        yield _memory(count, config["hidden_size"], config["vocab_size"], device)


def _memory(count: int, hidden: int, vocab: int, device: torch.device) -> Memory:
    torch.manual_seed(count)
    lengths = [PAIR_ROWS // 2] * (2 * count)
    rows = sum(lengths)
    states, ref_states = torch.randn(2, rows, hidden, device=device)
    weight = (torch.randn(vocab, hidden, device=device) * hidden**-0.5).requires_grad_()
    states.requires_grad_()
    targets = torch.randint(vocab, (rows,), device=device)
    groups = GroupLayout.pairs(lengths, device)
    loss = EdgeLoss(0.1)

    def run() -> None:
        reference = Reference(ref_states, weight.detach())
        preference_loss(
            states, weight, targets, groups, loss, reference, scale=1 / count, budget_bytes=HEAD_BUDGET
        ).loss.backward()

    def clear() -> None:
        states.grad = weight.grad = None

    run()
    clear()
    peak = measure.peak_bytes(run, device)
    if peak is None:
        clear()
        reset_peak()
        before = resident("VmRSS")
        run()
        peak = resident("VmHWM") - before
    gradients = states.nbytes + weight.nbytes
    return Memory(count, rows, (peak - gradients) / 2**20, 2 * rows * vocab * 4 / 2**20)


def write(folder: Path, facts: dict[str, Any], time: Sequence[Time], memory: Sequence[Memory]) -> list[Path]:
    """Write JSON and Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{head_report.stem(facts, 'scaling')}.json"
    values = {"time": [asdict(row) for row in time], "memory": [asdict(row) for row in memory]}
    path.write_text(json.dumps({**facts, **values}, indent=1) + "\n")
    lines = [f"# How a step grows, on {facts['hardware']}, {facts['date']}", "", f"`{facts['command']}`", ""]
    lines += [", ".join(f"{name} {number}" for name, number in facts["versions"].items()) + ".", ""]
    for table in tables(time, memory):
        lines += ["| " + " | ".join(table[0]) + " |", "|---:" * len(table[0]) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in table[1:]] + [""]
    path.with_suffix(".md").write_text("\n".join(lines))
    return [path, path.with_suffix(".md")]


def tables(time: Sequence[Time], memory: Sequence[Memory]) -> Iterator[list[list[str]]]:
    """The two tables, each with its titles first."""
    yield [
        ["tokens of the group", "s", "of it attention, s", "the rest, us per token"],
        *(
            [f"{t.tokens:,}", f"{t.seconds:.3g}", f"{t.attention:.3g}", f"{1e6 * t.others_per_token:.1f}"]
            for t in time
        ),
    ]
    yield [
        ["pairs", "scored rows", "head's memory, MiB", "all logits would be, MiB"],
        *([f"{m.pairs}", f"{m.rows:,}", f"{m.head:,.0f}", f"{m.all_logits:,.0f}"] for m in memory),
    ]


def facts(command: str) -> dict[str, Any]:
    return head_report.facts(command, this_device(), PACKAGES)
