"""Losses that look at the whole step equal one big batch in plain PyTorch, however the step is split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import make_config, run_ranks, save_model, sentence, write_pairs
from kernel_cases import relative_error
from zero3 import plain_steps, zero3_steps

from madpo.trainer.config import Config
from madpo.trainer.objectives.registry import OBJECTIVES

pytestmark = pytest.mark.ranks

BATCH, STEPS = 7, 3
SUM = {
    "loss_type": "weighted_sum",
    "terms": [{"loss_type": "beta_dpo"}, {"loss_type": "beta_dpo", "alpha": 0.1}, {"loss_type": "madpo"}],
    "loss_weights": [1.0, 0.5, 0.25],
}
OBJECTIVE_BLOCKS: list[dict[str, Any]] = [
    *({"loss_type": name} for name, entry in OBJECTIVES.items() if "batch" in entry.needs and name != "kto"),
    {"loss_type": "gamma_po"},
    {"loss_type": "aot", "beta": 0.5, "label_smoothing": 0.1},
    SUM,
]


def write_labelled(path: Path, count: int) -> Path:
    random = np.random.default_rng(0)
    rows = [
        {"prompt": f"{i} {sentence(random)}:", "completion": f" {sentence(random)}", "label": bool(i % 3)}
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
    kto = {"loss_type": "kto", "undesirable_weight": 1.5}
    cases = [(block, pairs) for block in OBJECTIVE_BLOCKS] + [(kto, labelled)]
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


def test_any_split_equals_one_plain_batch(configs):
    """One rank with several micro-batches, and four ranks, of which one runs dry in some steps."""
    train = configs[0].train.model_copy(update={"micro_batch_tokens": 128})
    small = [config.model_copy(update={"train": train}) for config in configs]
    alone = run_ranks(1, all_steps, small)[0]
    spread = run_ranks(4, all_steps, configs)[0]
    for config, *results in zip(configs, alone, spread, strict=True):
        want = plain_steps(config, STEPS)
        for result in results:
            for (loss, gradients), (plain_loss, plain_gradients) in zip(result, want, strict=True):
                assert loss == pytest.approx(plain_loss, rel=1e-5), config.objective
                flat, plain = (
                    torch.cat([g[name].flatten() for name in sorted(g)]) for g in (gradients, plain_gradients)
                )
                assert relative_error(flat, plain) < 2e-4, config.objective
