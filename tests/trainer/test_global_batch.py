"""Global-batch losses equal one big batch in plain PyTorch, however the step is split."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepspeed.runtime.zero.partitioned_param_coordinator import (
    PartitionedParameterCoordinator as Coordinator,
)
from harness import make_config, run_ranks, save_model, sentence, write_pairs
from plain import compare, plain_steps, zero3_steps

from madpo.trainer.batches.cost import StepCost, StepWork
from madpo.trainer.batches.steps import plan_step, step_rules
from madpo.trainer.config.schema import Config
from madpo.trainer.data.lengths import shapes_of
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.data.training_data import load_data
from madpo.trainer.metrics import Meter
from madpo.trainer.model.flops import step_cost
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.objectives.base import BatchState
from madpo.trainer.objectives.registry import OBJECTIVES
from madpo.trainer.stages.start_engine import start_engine
from madpo.trainer.step import train_step

pytestmark = pytest.mark.ranks

BATCH, STEPS = 7, 3
SUM = {
    "loss_type": "weighted_sum",
    "terms": [{"loss_type": "beta_dpo"}, {"loss_type": "beta_dpo", "alpha": 0.1}, {"loss_type": "madpo"}],
    "loss_weights": [1.0, 0.5, 0.25],
}
OBJECTIVE_BLOCKS: list[dict[str, Any]] = [{"loss_type": "alpha_dpo"}, {"loss_type": "amapo"}, SUM]
"""Beside kto: with a reference, without, with what is remembered. For each loss see test_every_loss.py."""


def write_labelled(path: Path, count: int) -> Path:
    random = np.random.default_rng(0)
    rows = [
        {
            "prompt": f"{i} {sentence(random)}:",
            "completion": f" {sentence(random)}",
            "label": bool(i % 3),
            "weight": (1.0, 0.5, 2.0)[i % 3],
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def configs(tmp_path_factory, tokenizer_folder) -> list[Config]:
    folder = tmp_path_factory.mktemp("whole")
    model = save_model(folder / "policy", tokenizer_folder, seed=1)
    reference = save_model(folder / "reference", tokenizer_folder, seed=2)
    pairs, labelled = write_pairs(folder / "pairs.jsonl", 40), write_labelled(folder / "labelled.jsonl", 40)
    weighted = folder / "weighted.jsonl"
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    weighted.write_text("".join(json.dumps(x | {"weight": i % 3}) + "\n" for i, x in enumerate(rows)))
    kto = {"loss_type": "kto", "undesirable_weight": 1.5}
    cases = [(OBJECTIVE_BLOCKS[0], pairs), *((block, weighted) for block in OBJECTIVE_BLOCKS[1:])]
    cases.append((kto, labelled))
    return [
        make_config(
            folder,
            {
                "model": {
                    "model_name_or_path": str(model),
                    "ref_model_name_or_path": str(reference) if needs_reference(block) else None,
                    "gradient_checkpointing": block is kto,
                },
                "data": {"dataset_name": str(path), "max_length": 48},
                "objective": block,
                "train": {"global_batch_size": BATCH},
            },
        )
        for block, path in cases
    ]


def needs_reference(block: dict[str, Any]) -> bool:
    entry = OBJECTIVES[block["loss_type"]]
    return entry.of(entry.params.model_validate(block)).needs_reference


def all_steps(shard, configs: list[Config]) -> list[Any]:
    return [zero3_steps(shard, config, STEPS) for config in configs]


def forgotten(shard, config: Config, steps: int) -> tuple[list[int], int]:
    """The number of micro-batches of each step, and how often ZeRO-3 threw away an order of modules."""
    times, forget = [], Coordinator._invalidate_trace
    setattr(Coordinator, "_invalidate_trace", lambda self: (times.append(self), forget(self)))  # noqa: B010
    tokenizer = load_tokenizer(config.model)
    groups = load_data(config, tokenizer, training=True).train
    assert groups is not None
    engine, rules, counts = start_engine(config, tokenizer, training=True), step_rules(config), []
    memory: dict[str, list[float]] = {}
    for number in range(steps):
        # Two groups are one micro-batch, and seven are several.
        step = plan_step(groups, np.arange(7 if number % 2 else 2), rules, shard)
        memory = train_step(engine, step, 1e-3, Meter(), BatchState(memory, (0, number))).memory
        counts.append(len(step.batches))
    return counts, len(times)


def test_orders_of_modules_are_kept_where_steps_alternate(configs):
    """One micro-batch goes through the modules otherwise than the several of another step."""
    train = configs[0].train.model_copy(update={"micro_batch_tokens": 128})
    config = configs[0].model_copy(update={"train": train})
    counts, times = run_ranks(1, forgotten, config, 6)[0]
    assert counts[::2] == [1] * 3 and min(counts[1::2]) > 1
    assert times == 0


def two_passes(shard, config: Config) -> tuple[list[int], StepWork, StepCost, list[TokenGroup]]:
    """The tokens of each pass of a step, its work, what it is measured by, and its groups."""
    tokenizer = load_tokenizer(config.model)
    groups = load_data(config, tokenizer, training=True).train
    assert groups is not None
    engine = start_engine(config, tokenizer, training=True)
    rules = step_rules(config, cost=step_cost(engine.module))
    step = plan_step(groups, np.arange(BATCH), rules, shard)
    sizes = list[int]()
    module: Any = engine.module
    module.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0].input_ids)))
    done = train_step(engine, step, 1e-3, Meter(), BatchState({}, (0, 0)))
    passes = np.array(sizes).reshape(2, -1).sum(1).tolist()
    return passes, done.work, rules.cost, [groups[index] for index in range(BATCH)]


def test_the_second_pass_skips_what_has_no_gradient(configs):
    """KTO's completions for other prompts, whose mean is a constant in its loss."""
    kto = configs[-1]
    config = kto.model_copy(update={"train": kto.train.model_copy(update={"micro_batch_tokens": 64})})
    passes, work, cost, groups = run_ranks(1, two_passes, config)[0]
    assert all(group.labels[1:] == [0] for group in groups)
    own = shapes_of([replace(group, completions=group.completions[:1]) for group in groups])
    assert passes == [work.tokens, own.tokens().sum()] and passes[0] > 1.2 * passes[1]
    forward, backward = cost.forward.of(shapes_of(groups)), cost.backward.of(own)
    assert work.flops == pytest.approx((forward + backward).sum(), rel=1e-12)
    again = (cost.again + cost.again_in_parts).of(own)
    assert work.flops_again == pytest.approx(again.sum(), rel=1e-12)


@pytest.mark.parametrize(
    "ranks, change",
    [
        (1, {"micro_batch_tokens": 128}),
        # Without weights that move, tests/whole/test_every_loss.py has this for every such loss.
        pytest.param(4, {"global_batch_size": 3}, marks=pytest.mark.slow),
    ],
    ids=["several micro-batches", "a rank without groups"],
)
def test_any_split_equals_one_plain_batch(configs, ranks, change):
    """Steps of a training, one after another."""
    changed = [c.model_copy(update={"train": c.train.model_copy(update=change)}) for c in configs]
    for config, steps in zip(changed, run_ranks(ranks, all_steps, changed)[0], strict=True):
        compare(steps, plain_steps(config, STEPS), tolerance=2e-5)
