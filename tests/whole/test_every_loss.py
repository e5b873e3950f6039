"""Every loss on two ranks under ZeRO-3, at odd parameters, is what a second opinion says of plain PyTorch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import make_config, run_ranks, save_model, write_pairs
from kernel_cases import relative_error
from lora_cases import changed
from odd_settings import CASES, ODD, Settings, keys, opinion
from shared_engine import MEMORY, Plain, every_loss, groups_of, loss_and_gradients, steps_of

from madpo.trainer.config.schema import Config
from madpo.trainer.objectives import build

pytestmark = pytest.mark.ranks

BATCH = 6
SETTINGS = [(name, ODD[name][index]) for name, index in CASES if name != "bradley_terry"]
"""All but that of reward models, which have no head of this kind: see tests/trainer/model/test_reward.py."""


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_folder) -> Config:
    folder = tmp_path_factory.mktemp("losses")
    names = {
        key: str(save_model(folder / key, tokenizer_folder, seed))
        for seed, key in enumerate(("model_name_or_path", "ref_model_name_or_path"))
    }
    pairs = write_pairs(folder / "pairs.jsonl", 2 * BATCH + 2)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    (folder / "above_zero.jsonl").write_text(
        "".join(json.dumps({**row, "margin": abs(row["margin"]) + 0.01}) + "\n" for row in rows)
    )
    return make_config(
        folder,
        {
            "model": names,
            "data": {"dataset_name": str(pairs), "max_length": 48},
            "objective": {"loss_type": "dpo"},
            "train": {"global_batch_size": BATCH},
        },
    )


def needs_of(name: str, settings: Settings) -> frozenset[str]:
    return build(name, **keys(name, settings)).needs


def config_of(base: Config, name: str, settings: Settings) -> Config:
    assert base.data.dataset_name is not None
    path = str(Path(base.data.dataset_name).with_name("above_zero.jsonl"))
    data = {"dataset_name": path} if name == "odpo" else {}
    block = {"loss_type": name, **keys(name, settings)}
    model = {} if "reference" in needs_of(name, settings) else {"ref_model_name_or_path": None}
    return changed(base, objective=block, data=data, model=model)


class Known:
    """What plain PyTorch knows of chunks of data, each computed once."""

    def __init__(self, base: Config) -> None:
        self.plain, self._facts = Plain(base), dict[str, Any]()

    def of(self, config: Config, step: int) -> Any:
        groups, size = groups_of(config), config.train.global_batch_size
        batch = [groups[index] for index in range(step * size, min((step + 1) * size, len(groups)))]
        key = repr(batch)
        if key not in self._facts:
            self._facts[key] = self.plain.facts(batch)
        return self._facts[key]

    def check(self, name: str, settings: Settings, config: Config, steps: list[Any]) -> None:
        """Losses, gradients and the drift from the reference of every step."""
        memory: dict[str, list[float]] = {}
        assert len(steps) == steps_of(config)
        for step, (record, gradients) in enumerate(steps):
            x, *leaves = self.of(config, step)
            x = replace(x, memory=memory, seed=(config.seed, step))
            loss, want, memory = loss_and_gradients(config, settings, self.plain, (x, *leaves))
            assert record["loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6), (name, settings)
            flat = [torch.cat([g[n].flatten() for n in sorted(want)]) for g in (gradients, want)]
            assert relative_error(*flat) < 1e-5, (name, settings)
            assert ("kl" in record) == config.bound_objective.needs_reference
            # Of completions that were borrowed from other prompts nothing is measured.
            own = np.repeat((x.labels != 0) | (name != "kto"), x.lengths)
            drift = ((x.tokens - x.ref_tokens)[own] ** 2 / 2).mean()
            assert record.get("kl", drift) == pytest.approx(drift, rel=1e-4), (name, settings)


def test_every_loss_is_what_a_second_opinion_says_of_plain_pytorch(base):
    configs = [config_of(base, name, settings) for name, settings in SETTINGS]
    evaluated = config_of(base, "beta_dpo", ODD["beta_dpo"][0])
    (got, evaluation), _ = run_ranks(2, every_loss, configs, evaluated, timeout=400)
    known = Known(base)
    for (name, settings), config, steps in zip(SETTINGS, configs, got, strict=True):
        known.check(name, settings, config, steps)

    losses = []
    for number in range(-(-len(groups_of(evaluated)) // BATCH)):
        x, *_ = known.of(evaluated, number)
        x = replace(x, memory=MEMORY, seed=(evaluated.seed, number))
        losses += opinion("beta_dpo", x, ODD["beta_dpo"][0])[0].tolist()
    assert evaluation["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize(
    "ranks, train, every",
    [
        (1, {"micro_batch_tokens": 128}, 2),
        (4, {"global_batch_size": 3}, 4),
        pytest.param(1, {"micro_batch_tokens": 128}, 1, marks=pytest.mark.slow),
        pytest.param(4, {"global_batch_size": 3}, 1, marks=pytest.mark.slow),
    ],
    ids=[
        "several micro-batches",
        "a rank without groups",
        "every loss, several micro-batches",
        "every loss, a rank without groups",
    ],
)
def test_losses_of_the_whole_step_do_not_depend_on_how_it_is_spread(base, ranks, train, every):
    settings = [(name, these) for name, these in SETTINGS if "batch" in needs_of(name, these)]
    assert len(settings) == 11
    settings = settings[::every]
    configs = [changed(config_of(base, name, these), train=train) for name, these in settings]
    got, _ = run_ranks(ranks, every_loss, configs, timeout=400)[0]
    known = Known(base)
    for (name, these), config, steps in zip(settings, configs, got, strict=True):
        known.check(name, these, config, steps)
