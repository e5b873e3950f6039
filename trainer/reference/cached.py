"""`model.reference: cached`: the reference's log-probs are scored once, and read from a file in training.

Policy and reference are never in memory together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_dist
from transformers import PreTrainedTokenizerBase

from madpo.trainer import dist
from madpo.trainer.batches.steps import Step, check_rows_fit, evaluation_steps, plan_step, step_rules
from madpo.trainer.config.schema import Config
from madpo.trainer.data.groups import TokenDataset, TokenGroups, with_logps
from madpo.trainer.data.order import permutation
from madpo.trainer.data.training_data import Data
from madpo.trainer.data.training_source import DatasetSource, TrainingSource
from madpo.trainer.dist import Shard
from madpo.trainer.engine import Engine, deepspeed_config
from madpo.trainer.errors import UserError
from madpo.trainer.model.build import check_vocabulary, load_reference
from madpo.trainer.model.freeze import count_parameters
from madpo.trainer.model.startup.attention import choose_attention
from madpo.trainer.model.startup.checks import check_head
from madpo.trainer.model.startup.positions import check_positions
from madpo.trainer.objectives.base import Item, Need
from madpo.trainer.reference import file as reference_file
from madpo.trainer.reference.file import FORMAT_VERSION, CacheKey
from madpo.trainer.reference.model import ReferenceAlone, weights_of_reference
from madpo.trainer.reports.progress import SECONDS_BETWEEN_LINES, print_line
from madpo.trainer.schedule import run_length
from madpo.trainer.scoring_module import Mode, ScoringModule
from madpo.trainer.zero3.loading import partitioned_loading

GROUPS_CHECKED = 8
"""Groups of a cached data set that are scored again at every start."""

BATCHES_PER_CHUNK = 8
"""Micro-batches that a rank scores, on average, before the ranks put their log-probs together."""

TOLERANCE = {False: (1e-4, 1e-2), True: (0.05, 2.0)}
"""bf16 -> nats by which log-probs of one token may differ, on average and at most. Rounding alone makes such
differences: a row packed with others goes through GEMMs of another shape, and a router may choose another
expert."""


@dataclass(frozen=True)
class CachedReference:
    """What is still needed of the reference once its model is gone."""

    vocab_size: int
    notes: list[str]  # where each data set's log-probs are, and whether they were scored now


def with_reference(
    config: Config, data: Data, tokenizer: PreTrainedTokenizerBase, shard: Shard, training: bool
) -> tuple[Data, CachedReference | None]:
    """The data with the reference's log-probs; unchanged, with None, where they are not to be cached.

    All ranks call it. Raises UserError on all of them for a file that is damaged, or whose numbers are not
    those of the reference.
    """
    if config.model.reference != "cached" or not config.bound_objective.needs_reference:
        return data, None
    weights = _on_main(shard, lambda: weights_of_reference(config))
    splits: dict[str, TokenDataset | None] = {
        "train": data.train if training else None,
        "held_out": data.held_out,
    }
    changes: dict[str, Any] = {}
    notes: list[str] = []
    scores = ReferenceScores(config, tokenizer, shard)
    for split, groups in splits.items():
        if groups is not None:
            changes[split], note = scores.read_or_score(groups, weights)
            notes.append(note)
    cached = CachedReference(scores.model.config.vocab_size, notes)
    scores.release()
    if "train" in changes:
        assert isinstance(data.source, DatasetSource)
        changes["source"] = data.source.seeing(changes["train"])
    return replace(data, **changes), cached


def score_once(
    config: Config, groups: TokenGroups, tokenizer: PreTrainedTokenizerBase, shard: Shard
) -> np.ndarray:  # (M,)
    """The reference's log-probs of all completion tokens, on every rank, without a file."""
    scores = ReferenceScores(config, tokenizer, shard)
    logps = np.concatenate(list(scores.score(groups)))
    scores.release()
    return logps


def cache_key(
    config: Config,
    weights: dict[str, Any],  # of `weights_of_reference`
    groups: TokenDataset,
    num_tokens: int,  # of the tokenizer
    attention: str,  # chosen at start-up
    device: torch.device,
) -> CacheKey:
    """Everything that decides a reference's log-probs but for rounding.

    What its head does to logits is in its config.json, which is among the weights. Examples, tokenizer,
    template and truncation are in the data's fingerprint.
    """
    peft, zero = config.peft, config.deepspeed.get("zero_optimization", {})
    return {
        "format": FORMAT_VERSION,
        **weights,
        "data": groups.fingerprint,
        "scored tokens": int(groups.counts.scored_tokens.sum()),
        "rows of the vocabulary": num_tokens if config.model.resize_embeddings else "as stored",
        "attention": attention,
        "dtype": "bf16" if config.train.bf16 else "fp32",
        "head_impl": config.train.head_impl,
        "device": device.type,
        "quantisation": peft.quantisation() if peft is not None and peft.quantised else None,
        "quantised communication": {key: zero[key] for key in sorted(zero) if "quantized" in key},
        **{name: version(name).partition(".")[0] for name in ("torch", "transformers")},
    }


class ReferenceScores:
    """The reference by itself in an engine: it scores groups, and fills and checks their cache files.

    All ranks call its methods. Whoever made it calls `release` before another model is loaded.
    """

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, shard: Shard) -> None:
        self.config, self.shard, self.num_tokens = config, shard, len(tokenizer)
        self.engine = _start_engine(config, tokenizer)
        self.model = self.engine.module.model

    def release(self) -> None:
        self.engine.release()
        del self.model

    def read_or_score(self, groups: TokenDataset, weights: dict[str, Any]) -> tuple[TokenDataset, str]:
        """The groups with log-probs from their file, which is written first if there is none; and a note.

        Raises UserError on all ranks for a file that cannot be used.
        """
        attention = str(self.model.config._attn_implementation)
        key = cache_key(self.config, weights, groups, self.num_tokens, attention, self.engine.device)
        folder = Path(self.config.data.cache_dir).expanduser()
        path = reference_file.path_of(folder, key)
        is_there, start = dist.from_main(path.is_file()), time.monotonic()
        if not is_there:
            if self.shard.is_main and (reason := reference_file.why_not_reused(folder, key)):
                print_line(f"reference: {groups.name} is scored anew: {reason}")
            chunks = list(self._with_progress(self.score(groups), groups))
            _on_main(self.shard, lambda: reference_file.write(path, np.concatenate(chunks), key))
        groups = self.read(groups, path, key)
        self.check(groups, path)
        done = "a sample scored again" if is_there else f"scored in {time.monotonic() - start:.1f} s"
        count = int(groups.counts.scored_tokens.sum())
        return groups, f"reference: cached, {count:,} log-probs of {groups.name} in {path}, {done}"

    def read(self, groups: TokenDataset, path: Path, key: CacheKey) -> TokenDataset:
        """The groups with the log-probs of a file. Raises UserError on all ranks if one cannot read it."""
        count, problem = int(groups.counts.scored_tokens.sum()), None
        try:
            logps = reference_file.read(path, key, count, verify=self.shard.is_main)
            groups = with_logps(groups, logps)
        except UserError as error:
            problem = str(error)
            if not (self.shard.is_main or path.is_file()):
                problem = f"{path}: rank 0 has log-probs here; data.cache_dir must be shared storage"
        dist.raise_if_any(problem)
        return groups

    def check(self, groups: TokenDataset, path: Path) -> None:
        """Raise UserError on all ranks if a sample, drawn by the seed, gets other log-probs than cached."""
        selected = np.sort(permutation(len(groups), self.config.seed, epoch=0)[:GROUPS_CHECKED])
        scored = np.concatenate(list(self.score(groups, selected)))
        assert groups.reference is not None
        cached = np.concatenate([groups.reference[i] for i in selected])
        dist.raise_if_any(
            _difference(
                torch.from_numpy(scored - cached),
                self.config.train.bf16,
                f"{path}: of {len(selected)} groups that the reference scored again the log-probs are others",
                "the file was changed, or what computes them; delete it, and they are scored anew",
            )
        )

    def score(self, groups: TokenGroups, selected: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """The reference's log-probs (m,) of one chunk of the groups after another, on every rank."""
        rules = step_rules(self.config, self.engine.module)
        # Without gradients a long row fits one rank.
        rules = replace(rules, item=Item.TOKEN, ranks_per_row=1)
        check_rows_fit(groups, rules)
        check_positions(self.model, groups)
        counts = groups.counts
        selected = np.arange(len(counts.lengths)) if selected is None else selected
        budget = BATCHES_PER_CHUNK * rules.budget * self.shard.world_size
        size = max(1, round(budget * len(counts.lengths) / max(int(counts.lengths.sum()), 1)))
        for number, step in enumerate(evaluation_steps(groups, rules, size, self.shard, selected)):
            chunk = selected[number * size : (number + 1) * size]
            yield self._score_chunk(step, counts.scored_tokens[chunk], counts.sequences[chunk])

    @torch.no_grad()
    def _score_chunk(
        self,
        step: Step,
        tokens: np.ndarray,  # (G,) scored tokens of each group of the chunk
        sequences: np.ndarray,  # (G,)
    ) -> np.ndarray:  # (m,)
        """Each rank fills in the groups it scored, in an array of zeros; the sum over ranks is the chunk."""
        first_token, first_sequence = (np.cumsum(counts) - counts for counts in (tokens, sequences))
        flat = torch.zeros(int(tokens.sum()), dtype=torch.float32, device=self.engine.device)
        for batch in step.batches:
            logps = self.engine(batch.to(self.engine.device), Mode.SCORE).tokens.token_logps
            if batch.is_dummy:
                continue
            firsts = np.cumsum((0, *batch.group_sequences[:-1]), dtype=np.int64)
            members = np.searchsorted(first_sequence, batch.sequence_positions.numpy()[firsts], "right") - 1
            for group, part in zip(members, logps.split(tokens[members].tolist()), strict=True):
                flat[first_token[group] :][: len(part)] = part
        torch_dist.all_reduce(flat)
        return flat.cpu().numpy()

    def _with_progress(self, chunks: Iterator[np.ndarray], groups: TokenDataset) -> Iterator[np.ndarray]:
        """The chunks on rank 0, which prints a progress line now and then; nothing on other ranks."""
        count, done, last = int(groups.counts.scored_tokens.sum()), 0, time.monotonic()
        for chunk in chunks:
            if not self.shard.is_main:
                continue
            yield chunk
            done += len(chunk)
            if time.monotonic() - last > SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                print_line(f"reference: {done / count:.0%} of {groups.name} scored")


def _start_engine(config: Config, tokenizer: PreTrainedTokenizerBase) -> Engine[ReferenceAlone]:
    """An engine around the reference alone, without an optimiser."""
    with partitioned_loading(deepspeed_config(config, training=False)):
        reference = load_reference(config, tokenizer)
        budget_bytes = int(config.train.head_gib * 2**30)
        module = ReferenceAlone(reference, budget_bytes, config.train.head_impl)
    engine = Engine(config, module, training=False)
    choose_attention(module.model, config.model.attention, engine.device, config.data.max_length)
    check_head(module.model, engine.device)
    engine.eval()
    return engine


def check_policy_fits(
    config: Config,
    engine: Engine,
    source: TrainingSource,
    shard: Shard,
    cached: CachedReference,
    is_fresh: bool,
) -> None:
    """Check the policy against the cache; raises UserError on all ranks.

    Its vocabulary must be the reference's. A fresh run that starts from its own reference must reproduce the
    cached log-probs of its first micro-batch.
    """
    model = config.model
    check_vocabulary(engine.module.policy.config.vocab_size, cached.vocab_size)
    named = model.ref_model_name_or_path
    is_own = named is None or (named == model.model_name_or_path and model.model_revision is None)
    if not (is_fresh and is_own):
        return
    groups, indices = source.take(0, min(config.train.global_batch_size, source.num_groups or 1))
    rules = step_rules(config, engine.module)
    batch = plan_step(groups, indices, rules, shard).batches[0].to(engine.device)
    engine.eval()
    with torch.no_grad():
        tokens = engine(batch, Mode.SCORE).tokens
    assert tokens.ref_token_logps is not None
    differences = tokens.token_logps - tokens.ref_token_logps
    problem = None
    if not batch.is_dummy:
        problem = _difference(
            differences,
            config.train.bf16,
            "model.reference: training starts at the reference, but the policy's log-probs differ from those "
            "that were cached for it",
            f"delete the file, or set model.reference=auto ({'; '.join(cached.notes)})",
        )
    dist.raise_if_any(problem)


def _difference(
    differences: torch.Tensor,  # (k,) of log-probs
    bf16: bool,
    what: str,
    advice: str,
) -> str | None:
    """An error text (`what`, by how much, `advice`) if the differences are more than rounding; else None."""
    if not len(differences):
        return None
    mean, most = float(differences.abs().mean()), float(differences.abs().max())
    mean_allowed, most_allowed = TOLERANCE[bf16]
    if mean <= mean_allowed and most <= most_allowed:
        return None
    return (
        f"{what}, by {mean:.2g} nats a token on average and {most:.2g} at most ({mean_allowed:g} and "
        f"{most_allowed:g} are allowed for rounding); {advice}"
    )


def _on_main(shard: Shard, work: Callable[[], Any]) -> Any:
    """The result of rank 0's `work`, on all ranks. A UserError or OSError there is a UserError on all."""
    value, problem = None, None
    if shard.is_main:
        try:
            value = work()
        except (UserError, OSError) as error:
            problem = str(error)
    dist.raise_if_any(problem)
    return dist.from_main(value)


def reference_notes(
    config: Config, module: ScoringModule, source: TrainingSource, cached: CachedReference | None
) -> list[str]:
    """Notes on how the reference is scored, what that costs, and whether a cache would cost less."""
    if cached is not None:
        return cached.notes
    if module.reference_scorer is None:
        return []
    length, extra = run_length(config, source.num_groups), "one more forward pass a step"
    if module.reference is None:
        note = f"reference: the policy without its adapter: no second model, {extra}"
    else:
        size = count_parameters(module.reference)[1]
        note = f"reference: joint, a frozen model of {size:,} parameters beside the policy, {extra}"
    can_be_cached = not config.model.sync_ref_model and Need.KL not in config.bound_objective.needs
    if source.num_groups is not None and can_be_cached and length.total_groups > source.num_groups:
        times = length.total_groups / source.num_groups
        note += f"; model.reference=cached would compute it once for every completion, not {times:.3g} times"
    return [note]
