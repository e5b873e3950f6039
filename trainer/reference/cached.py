"""`model.reference: cached`: the reference's log-probs are scored once and read from a file in training.

While it is scored the reference is alone in memory, and while the policy is trained it is not there at all.
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
from madpo.trainer.objectives.base import Item, Need
from madpo.trainer.reference import file as reference_file
from madpo.trainer.reference.file import FORMAT_VERSION
from madpo.trainer.reference.model import ReferenceAlone, weights_of_reference
from madpo.trainer.reports.progress import SECONDS_BETWEEN_NEWS, print_line
from madpo.trainer.schedule import run_length
from madpo.trainer.scoring_module import Mode, ScoringModule
from madpo.trainer.zero3.loading import partitioned_loading

RECHECKED = 8
"""Groups of a stored set that are scored again at every start."""

BATCHES_BETWEEN_MEETINGS = 8
"""Micro-batches that a rank scores, on average, before the ranks put their log-probs together."""

TOLERANCE = {False: (1e-4, 1e-2), True: (0.05, 2.0)}
"""bf16 -> nats by which log-probs of the same tokens may differ, on average and at most. Only rounding may:
a row packed with others goes through GEMMs of another shape, and a mixture's router may tip over."""


@dataclass(frozen=True)
class CachedReference:
    """What is known of the reference once it is gone."""

    vocab_size: int
    notes: list[str]  # what was scored or found, a line for each set


def with_reference(
    config: Config, data: Data, tokenizer: PreTrainedTokenizerBase, shard: Shard, training: bool
) -> tuple[Data, CachedReference | None]:
    """The data with the reference's log-probs, if they are to be cached.

    What is not there is scored, on all ranks; of what is there a sample is scored again. Raises UserError on
    all ranks for a file that is damaged, or whose numbers are not those of the reference.
    """
    if config.model.reference != "cached" or not config.bound_objective.needs_reference:
        return data, None
    weights = _on_main(shard, lambda: weights_of_reference(config))
    splits: dict[str, TokenDataset | None] = {
        "train": data.train if training else None,
        "held_out": data.held_out,
    }
    found: dict[str, Any] = {}
    notes: list[str] = []
    engine = _start(config, tokenizer)
    attention = str(engine.module.model.config._attn_implementation)
    for split, groups in splits.items():
        if groups is not None:
            parts = parts_of(config, weights, groups, len(tokenizer), attention, engine.device)
            found[split], note = _cached(engine, groups, parts, config, shard)
            notes.append(note)
    cached = CachedReference(engine.module.model.config.vocab_size, notes)
    engine.release()
    if "train" in found:
        assert isinstance(data.source, DatasetSource)
        found["source"] = data.source.seeing(found["train"])
    return replace(data, **found), cached


def score_once(
    config: Config, groups: TokenGroups, tokenizer: PreTrainedTokenizerBase, shard: Shard
) -> np.ndarray:  # (M,)
    """The reference's log-probs of all completion tokens on every rank, kept in no file."""
    engine = _start(config, tokenizer)
    found = np.concatenate(list(_scores(engine, groups, config, shard)))
    engine.release()
    return found


def parts_of(
    config: Config,
    weights: dict[str, Any],  # of `weights_of_reference`
    groups: TokenDataset,
    num_tokens: int,  # of the tokenizer
    attention: str,  # as it was settled
    device: torch.device,
) -> dict[str, Any]:
    """Everything that decides a reference's log-probs but for their rounding. What its head does to logits
    is in its config.json, among the weights; rows, tokenizer, template and truncation are in the data's
    fingerprint."""
    peft, zero = config.peft, config.deepspeed.get("zero_optimization", {})
    quantised = peft is not None and peft.quantised
    quantisation = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant")
    return {
        "format": FORMAT_VERSION,
        **weights,
        "data": groups.fingerprint,
        "completion tokens": int(groups.counts.completion_tokens.sum()),
        "rows of the vocabulary": num_tokens if config.model.resize_embeddings else "as stored",
        "attention": attention,
        "dtype": "bf16" if config.train.bf16 else "fp32",
        "head_impl": config.train.head_impl,
        "device": device.type,
        "quantisation": {key: getattr(peft, key) for key in quantisation} if quantised else None,
        "quantised communication": {key: zero[key] for key in sorted(zero) if "quantized" in key},
        **{name: version(name).partition(".")[0] for name in ("torch", "transformers")},
    }


def _start(config: Config, tokenizer: PreTrainedTokenizerBase) -> Engine[ReferenceAlone]:
    """An engine around the reference alone, without an optimiser."""
    with partitioned_loading(deepspeed_config(config, training=False)):
        reference = load_reference(config, tokenizer)
        budget_bytes = int(config.train.head_gib * 2**30)
        module = ReferenceAlone(reference, budget_bytes, config.train.head_impl)
    engine = Engine(config, module, training=False)
    choose_attention(module.model, config.model.attention, engine.device)
    check_head(module.model, engine.device)
    engine.eval()
    return engine


def _cached(
    engine: Engine[ReferenceAlone], groups: TokenDataset, parts: dict[str, Any], config: Config, shard: Shard
) -> tuple[TokenDataset, str]:
    """The groups with log-probs from the file, which is written if it is not there; and what was done."""
    folder = Path(config.data.cache_dir).expanduser()
    path = reference_file.path_of(folder, parts)
    count, is_there = int(groups.counts.completion_tokens.sum()), dist.from_main(path.is_file())
    start = time.monotonic()
    if not is_there:
        if shard.is_main and (other := reference_file.nearest(folder, parts)):
            print_line(f"reference: {groups.name} is scored anew: {other}")
        found = list(_with_news(_scores(engine, groups, config, shard), groups, shard))
        _on_main(shard, lambda: reference_file.write(path, np.concatenate(found), parts))
    problem = None
    try:
        groups = with_logps(groups, reference_file.read(path, parts, count, whole=shard.is_main))
    except UserError as error:
        problem = str(error)
        if not (shard.is_main or path.is_file()):
            problem = f"{path}: rank 0 has log-probs here; data.cache_dir must be shared storage"
    dist.raise_if_any(problem)
    _recheck(engine, groups, config, shard, path)
    done = "a sample scored again" if is_there else f"scored in {time.monotonic() - start:.1f} s"
    return groups, f"reference: cached, {count:,} log-probs of {groups.name} in {path}, {done}"


def _recheck(
    engine: Engine[ReferenceAlone], groups: TokenDataset, config: Config, shard: Shard, path: Path
) -> None:
    """Raise UserError on all ranks if a sample of the groups, drawn by the seed, is scored otherwise now."""
    selected = np.sort(permutation(len(groups), config.seed, epoch=0)[:RECHECKED])
    now = np.concatenate(list(_scores(engine, groups, config, shard, selected)))
    assert groups.reference is not None
    kept = np.concatenate([groups.reference[i] for i in selected])
    dist.raise_if_any(
        _difference(
            torch.from_numpy(now - kept),
            config.train.bf16,
            f"{path}: of {len(selected)} groups that the reference scored again the log-probs are others",
            "the file was changed, or what computes them; delete it, and they are scored anew",
        )
    )


def check_policy_fits(
    config: Config,
    engine: Engine,
    source: TrainingSource,
    shard: Shard,
    cached: CachedReference,
    is_fresh: bool,
) -> None:
    """Raise UserError on all ranks for a policy with another vocabulary, and for a fresh run from its own
    reference that does not begin at a margin of 0: the policy gives the completions of the first micro-batch
    other log-probs than were cached."""
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
    drift = (tokens.token_logps - tokens.ref_token_logps)[: 0 if batch.is_dummy else None]
    dist.raise_if_any(
        _difference(
            drift,
            config.train.bf16,
            "model.reference: training starts at the reference, but the policy's log-probs differ from those "
            "that were cached for it",
            f"delete the file, or set model.reference=auto ({'; '.join(cached.notes)})",
        )
    )


def _difference(
    drift: torch.Tensor,  # (k,)
    bf16: bool,
    what: str,
    advice: str,
) -> str | None:
    """What is wrong with differences that are more than rounding, or None."""
    if not len(drift):
        return None
    mean, most = float(drift.abs().mean()), float(drift.abs().max())
    mean_allowed, most_allowed = TOLERANCE[bf16]
    if mean <= mean_allowed and most <= most_allowed:
        return None
    return (
        f"{what}, by {mean:.2g} nats a token on average and {most:.2g} at most ({mean_allowed:g} and "
        f"{most_allowed:g} are allowed for rounding); {advice}"
    )


def _scores(
    engine: Engine[ReferenceAlone],
    groups: TokenGroups,
    config: Config,
    shard: Shard,
    selected: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """The reference's log-probs (m,) of stretches of the groups, in their order, on every rank."""
    of_run = step_rules(config, engine.module)
    rules = replace(of_run, item=Item.TOKEN, ranks_per_row=1)  # without gradients a long row fits one rank
    check_rows_fit(groups, rules)
    selected = np.arange(len(groups.counts.lengths)) if selected is None else selected
    budget = BATCHES_BETWEEN_MEETINGS * rules.budget * shard.world_size
    size = max(1, round(budget * len(groups.counts.lengths) / max(int(groups.counts.lengths.sum()), 1)))
    for number, step in enumerate(evaluation_steps(groups, rules, size, shard, selected)):
        here = selected[number * size : (number + 1) * size]
        yield _stretch(engine, step, groups.counts.completion_tokens[here], groups.counts.sequences[here])


@torch.no_grad()
def _stretch(
    engine: Engine[ReferenceAlone],
    step: Step,
    tokens: np.ndarray,  # (G,) completion tokens of each group of the stretch
    sequences: np.ndarray,  # (G,)
) -> np.ndarray:  # (m,)
    """Each rank fills in its own groups, and the sum over ranks is the whole."""
    first_token, first_sequence = (np.cumsum(counts) - counts for counts in (tokens, sequences))
    flat = torch.zeros(int(tokens.sum()), dtype=torch.float32, device=engine.device)
    for batch in step.batches:
        logps = engine(batch.to(engine.device), Mode.SCORE).tokens.token_logps
        if batch.is_dummy:
            continue
        firsts = np.cumsum((0, *batch.group_sequences[:-1]), dtype=np.int64)
        members = np.searchsorted(first_sequence, batch.sequence_positions.numpy()[firsts], "right") - 1
        for group, part in zip(members, logps.split(tokens[members].tolist()), strict=True):
            flat[first_token[group] :][: len(part)] = part
    torch_dist.all_reduce(flat)
    return flat.cpu().numpy()


def _with_news(stretches: Iterator[np.ndarray], groups: TokenDataset, shard: Shard) -> Iterator[np.ndarray]:
    """The same, kept on rank 0 alone, which says now and then how far it has come."""
    count, done, last = int(groups.counts.completion_tokens.sum()), 0, time.monotonic()
    for stretch in stretches:
        if not shard.is_main:
            continue
        yield stretch
        done += len(stretch)
        if time.monotonic() - last > SECONDS_BETWEEN_NEWS:
            last = time.monotonic()
            print_line(f"reference: {done / count:.0%} of {groups.name} scored")


def _on_main(shard: Shard, work: Callable[[], Any]) -> Any:
    """What rank 0 finds, on all ranks; a UserError of its own too."""
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
    """How the reference is scored, what that costs, and whether cached log-probs would cost less."""
    if cached is not None:
        return cached.notes
    if module.reference_scorer is None:
        return []
    plan, extra = run_length(config, source.num_groups), "one more forward pass a step"
    if module.reference is None:
        note = f"reference: the policy without its adapter: no second model, {extra}"
    else:
        size = count_parameters(module.reference)[1]
        note = f"reference: joint, a frozen model of {size:,} parameters beside the policy, {extra}"
    can_be_cached = not config.model.sync_ref_model and Need.KL not in config.bound_objective.needs
    if source.num_groups is not None and can_be_cached and plan.total_groups > source.num_groups:
        times = plan.total_groups / source.num_groups
        note += f"; model.reference=cached would score every completion once in place of {times:.3g} times"
    return [note]
