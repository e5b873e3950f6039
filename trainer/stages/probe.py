"""Measure how well a model predicts its training set before training, and suggest a supervised objective.

Source: Li et al. 2025 (arXiv 2510.00526), who take the mean predicted probability of a token as a measure of
what a base model knows of a task.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_dist
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from madpo.trainer import dist
from madpo.trainer.batches.steps import evaluation_steps, step_rules
from madpo.trainer.config.locate import located
from madpo.trainer.config.schema import Config
from madpo.trainer.data.groups import TokenDataset
from madpo.trainer.data.order import permutation
from madpo.trainer.data.training_data import load_data
from madpo.trainer.dist import Shard
from madpo.trainer.engine import Engine
from madpo.trainer.errors import UserError
from madpo.trainer.files import read_object, write_object
from madpo.trainer.model.build import known_tokens
from madpo.trainer.model.pretrained import state_of_files
from madpo.trainer.model.startup.positions import check_positions
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.objectives.base import Item
from madpo.trainer.objectives.sft import NLLParams
from madpo.trainer.reports.progress import print_findings
from madpo.trainer.scoring_module import Mode
from madpo.trainer.stages.start_engine import start_engine

MOST_GROUPS = 2000
STRONG, WEAK = 0.63, 0.25
"""Limits of the mean probability, halfway between those of the paper's tasks: mathematics .76 to .81, where
-p was far better than -log p; medicine .50, where both were equal; an unseen notation .01, where -p learned
nothing."""


@dataclass(frozen=True)
class Probe:
    """The probabilities that the starting model gives to the completions it is to be trained on."""

    of: dict[str, Any]  # identity of the model and data that were probed
    groups: int
    tokens: int
    mean_probability: float  # over tokens
    standard_error: float  # over groups, because tokens of a group are not independent
    nll: float
    percentiles: list[float] = field(repr=False)  # 0, 1, .. 100 of the tokens' probabilities

    @property
    def capability(self) -> str:
        if self.mean_probability >= STRONG:
            return "strong"
        return "weak" if self.mean_probability < WEAK else "intermediate"

    @property
    def suggestion(self) -> str:
        """An objective block, and the reason for it."""
        return {
            "strong": "{loss_type: f_alpha, alpha: 1}: train mostly on what the model finds likely (1 - p)",
            "intermediate": "{loss_type: nll} or {loss_type: f_alpha, alpha: 1}: try both, either may win",
            "weak": "{loss_type: nll}: train on every token, unlikely ones most (-log p)",
        }[self.capability]


def run_probe(config: Config) -> None:
    """Measure, print the result, and store it in the run folder. Raises UserError."""
    if config.data.streaming:
        raise UserError("data.streaming: probe draws from the whole training set; set data.streaming=false")
    config = _supervised(located(config))
    tokenizer = load_tokenizer(config.model)
    data = load_data(config, tokenizer, True, known_tokens(config, tokenizer))
    assert data.train is not None
    shard = dist.init(config.launch.timeout_minutes, config.launch.start_timeout_minutes)
    if shard.is_main:
        print_findings(data.report)
    probe = stored_probe(config, data.train, tokenizer, shard)
    if shard.is_main:
        show(probe, _path(config))


def stored_probe(
    config: Config, groups: TokenDataset, tokenizer: PreTrainedTokenizerBase, shard: Shard
) -> Probe:
    """Read the probe in the run folder if it is of this model and data; else measure and store one."""
    path, of = _path(config), _identity(config, groups)
    stored = dist.from_main(read_object(path))
    if stored.get("of") == of:
        return Probe(**stored)
    engine = start_engine(_supervised(config), tokenizer, training=False)
    check_positions(engine.module.policy, groups)
    probe = _measure(engine, groups, config, shard, of)
    engine.release()
    if shard.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_object(path, asdict(probe))
    return probe


def _path(config: Config) -> Path:
    return Path(config.output_dir) / "probe.json"


def _supervised(config: Config) -> Config:
    """A copy of the config with a supervised objective, which needs log-probs of the policy only."""
    model = config.model.model_copy(update={"ref_model_name_or_path": None, "reference": "auto"})
    # Supervised data has no margins to sort by.
    data = config.data.model_copy(update={"order": "shuffled"})
    return config.model_copy(update={"objective": NLLParams(), "model": model, "data": data})


def _identity(config: Config, groups: TokenDataset) -> dict[str, Any]:
    return {
        **config.model.only("model_name_or_path", "model_revision", "init_config"),
        "files": [list(file) for file in state_of_files(str(config.model.model_name_or_path))],
        "data": groups.fingerprint,
        "seed": config.seed,
        "bf16": config.train.bf16,
    }


@torch.no_grad()
def _measure(engine: Engine, groups: TokenDataset, config: Config, shard: Shard, of: dict[str, Any]) -> Probe:
    """Score the completions of at most MOST_GROUPS groups, which the seed draws."""
    engine.eval()
    selected = np.sort(permutation(len(groups), config.seed, epoch=0)[:MOST_GROUPS])
    rules = dataclasses.replace(step_rules(config, engine.module), item=Item.TOKEN)
    own: list[np.ndarray] = []  # log-probs of the completions that this rank scored
    for step in evaluation_steps(groups, rules, config.train.global_batch_size, shard, selected):
        for batch in step.batches:
            logps = engine(batch.to(engine.device), Mode.SCORE).tokens.token_logps
            is_first = shard.rank % rules.ranks_per_row == 0  # ranks that share a row have equal scores
            if is_first and not batch.is_dummy:
                own += [part.double().cpu().numpy() for part in logps.split(batch.lengths)]
    gathered: list[Any] = [None] * shard.world_size
    torch_dist.all_gather_object(gathered, own)
    logps = [part for parts in gathered for part in parts]
    tokens = np.concatenate(logps)
    means = np.array([np.exp(part).mean() for part in logps])
    weights = np.array([len(part) for part in logps]) / len(tokens)
    mean = float(np.exp(tokens).mean())
    return Probe(
        of,
        len(logps),
        len(tokens),
        mean,
        float(math.sqrt((weights**2 * (means - mean) ** 2).sum())),
        float(-tokens.mean()),
        np.quantile(np.exp(tokens), np.linspace(0, 1, 101)).tolist(),
    )


def show(probe: Probe, path: Path) -> None:
    """Print the numbers and the suggestion."""
    tenth, half, most = (f"{probe.percentiles[i]:.3f}" for i in (10, 50, 90))
    table = Table("measured on the training set", "", box=None, pad_edge=False)
    table.add_row("completions, tokens", f"{probe.groups:,}, {probe.tokens:,}")
    table.add_row("mean probability of a token", f"{probe.mean_probability:.3f} ± {probe.standard_error:.3f}")
    table.add_row("its 10 %, 50 %, 90 % quantiles", f"{tenth}, {half}, {most}")
    table.add_row("nll per token", f"{probe.nll:.3f} nats")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(
        f"\n{probe.capability}: the mean is {_compared(probe)}\nsuggested objective: {probe.suggestion}\n"
        f"stored in {path}",
        markup=False,
    )


def _compared(probe: Probe) -> str:
    if probe.capability == "strong":
        return f"above {STRONG}"
    return f"below {WEAK}" if probe.capability == "weak" else f"between {WEAK} and {STRONG}"
