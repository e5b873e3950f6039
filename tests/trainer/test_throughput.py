"""Metrics of speed and memory, by hand, and that the lengths they come from are those of the groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness import make_config, run_ranks, write_pairs

from madpo.trainer.batches.cost import StepWork
from madpo.trainer.config.schema import Config
from madpo.trainer.data.dataset import GroupDataset
from madpo.trainer.data.groups import ConcatenatedGroups, TokenGroups
from madpo.trainer.data.tokenised_cache import load_groups
from madpo.trainer.data.views.mismatched import MismatchedDataset
from madpo.trainer.metrics import Meter
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.throughput import MEMORY, PeakMemory, known_peak, peak_flops, throughput

CPU = torch.device("cpu")


def test_throughput_by_hand():
    work = StepWork(3000, 4000, 8000, 6e12, 2e12, 1.2, 1.0)
    slow = throughput(work, steps=4, seconds=2.0, world_size=3, peak=None)
    assert slow == {
        "perf/step_time": 0.5,
        "perf/tokens_per_second": 1500.0,
        "perf/padded_tokens_per_second": 4000.0,
        "perf/prefix_savings": 0.25,
        "perf/imbalance": pytest.approx(1.2),
        "perf/tflops_per_rank": 1.0,
    }
    record = throughput(work, 4, 2.0, 3, peak=4e12)
    assert record == slow | {"perf/mfu": 0.25, "perf/hfu": pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362.05),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_of_devices_by_their_names(name, tflops):
    assert known_peak(name) == (None if tflops is None else tflops * 1e12)


def test_the_users_peak_comes_first_and_a_cpu_has_none():
    assert peak_flops(0.5, CPU, bf16=False) == 5e11
    assert peak_flops(None, CPU, bf16=True) is None


def test_memory_is_known_after_a_phase_and_forgotten_when_taken():
    memory = PeakMemory()
    assert memory.take() == {}
    with memory.phase("forward_backward"):
        kept = np.ones(2**24)
    first = memory.take()
    assert set(first) == {MEMORY} and kept.nbytes / 2**30 < first[MEMORY] < 64
    assert memory.take() == {}


@pytest.mark.ranks
def test_memory_is_that_of_the_rank_that_took_most():
    records = run_ranks(2, with_memory)
    assert records[0] == records[1] == {"loss": 0.5, MEMORY: 2.0}


def with_memory(shard) -> dict[str, float]:
    meter = Meter()
    meter.add("loss", torch.tensor([float(shard.rank)]))
    setattr(meter.memory, "take", lambda: {MEMORY: 1.0 + shard.rank})  # noqa: B010
    return meter.reduce()


@pytest.fixture
def config(tmp_path, tokenizer_folder) -> Config:
    model = {"model_name_or_path": str(tokenizer_folder)}
    data = {"dataset_name": str(write_pairs(tmp_path / "pairs.jsonl", 30)), "max_length": 24}
    return make_config(tmp_path, {"model": model, "data": data})


def groups_of(config: Config) -> GroupDataset:
    return load_groups(config.data, "train", load_tokenizer(config.model))[0]


@pytest.mark.parametrize("kind", ["whole", "selected", "mismatched", "chained"])
def test_shapes_are_those_of_the_groups(config, kind):
    whole = groups_of(config)
    odd = whole.select(np.arange(1, 29, 2)[::-1], "odd")
    groups: TokenGroups = {
        "whole": lambda: whole,
        "selected": lambda: odd,
        "mismatched": lambda: MismatchedDataset(whole, seed=3, max_length=24),
        "chained": lambda: ConcatenatedGroups([odd, whole]),
    }[kind]()
    indices = np.random.default_rng(0).integers(0, len(groups.counts.lengths), 12)
    shapes, read = groups.shapes(indices), [groups[int(index)] for index in indices]
    assert shapes.prompts.tolist() == [len(group.prompt) for group in read]
    assert shapes.sequences.tolist() == [len(group.completions) for group in read]
    assert shapes.completions.tolist() == [len(c) for group in read for c in group.completions]
    assert shapes.tokens().tolist() == groups.counts.lengths[indices].tolist()
