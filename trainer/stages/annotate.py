"""Score a data set's pairs with reward models, and write it out with the margins, for the next stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_dist
from rich.console import Console

from madpo.trainer import dist
from madpo.trainer.batches.steps import evaluation_steps, step_rules
from madpo.trainer.checkpoints.choose import choose
from madpo.trainer.checkpoints.identity import identity, model_identity
from madpo.trainer.checkpoints.load import load
from madpo.trainer.config.annotation import check_annotation
from madpo.trainer.config.locate import located, model_folder
from madpo.trainer.config.schema import AnnotateConfig, Config
from madpo.trainer.counted import counted
from madpo.trainer.data.dataset import GroupDataset
from madpo.trainer.data.folds import folds_of, without_fold
from madpo.trainer.data.groups import TokenDataset, check_groups
from madpo.trainer.data.report import Report
from madpo.trainer.data.source import open_source, test_split
from madpo.trainer.data.tokenised_cache import load_groups
from madpo.trainer.data.training_data import merged
from madpo.trainer.data.training_source import content_of
from madpo.trainer.dist import Shard, barrier
from madpo.trainer.engine import Engine
from madpo.trainer.errors import UserError
from madpo.trainer.model.build import known_tokens
from madpo.trainer.model.reward import RewardModel
from madpo.trainer.model.startup.positions import check_positions
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.objectives.reward import BradleyTerryParams
from madpo.trainer.objectives.scores import segment_sum
from madpo.trainer.reports.calibration_report import write_calibration_report
from madpo.trainer.reports.progress import print_findings
from madpo.trainer.schedule import run_length
from madpo.trainer.scoring_module import Mode
from madpo.trainer.stages.annotated_split import margins_of, together, write_split
from madpo.trainer.stages.start_engine import start_engine
from madpo.trainer.state import TrainState

SEEN = ", seen in training"
"""Behind the name of a split whose pairs were scored by a model that was trained on them."""


@dataclass(frozen=True)
class RewardCheckpoint:
    """A reward model: the newest checkpoint of the config's run, or else the model that the config names."""

    config: Config
    given: bool = False  # use the model that the config names; look for no checkpoint
    fold: int | None = None  # the fold that it was trained without


def run_annotation(config: Config) -> None:
    """Write `<output_dir>/annotated/<split>.jsonl` for the splits that the config names.

    `annotation.json` and `report.html` stand beside them. The scores come from
    - the newest checkpoint of the reward run in `output_dir`, or the model of the config if there is none;
    - with `annotate.models`: those models; a score is their mean;
    - with `annotate.folds`: the runs `fold-<k>` in `output_dir`. A training example is scored by the model
      that was trained without it, any other example by the mean of all.

    Every example that can be read is written, with `score_chosen`, `score_rejected` and `margin` where it
    could be scored. Margins and scores of the source are renamed to `..._given`, so that only one scale is
    left. Raises UserError.
    """
    check_annotation(config)
    judges = [replace(judge, config=located(judge.config)) for judge in judges_of(config)]
    loaded = [load_pairs(x.config) for x in judges]  # before the ranks join, as tokenising may take long
    data = [groups for groups, _ in loaded]
    shard = dist.init(config.launch.timeout_minutes, config.launch.start_timeout_minutes)
    if shard.is_main:
        print_findings({split: report() for split, report in loaded[0][1].items()})
    judged = [_score(judge, groups, shard) for judge, groups in zip(judges, data, strict=True)]
    if shard.is_main:
        _write_all(config, data, [scores for _, scores in judged], [name for name, _ in judged])
    barrier()


def _write_all(
    config: Config,
    data: list[dict[str, GroupDataset]],  # for each judge
    scores: list[dict[str, np.ndarray]],  # for each judge, split -> (G, 2)
    names: list[str],
) -> None:
    target, margins = Path(config.output_dir) / "annotated", dict[str, np.ndarray]()
    for split, groups in data[0].items():
        folds = None
        if config.annotate.folds is not None and split == config.data.dataset_train_split:
            folds = folds_of(groups.prompt_hashes, config.annotate.folds)
        scored = together([own[split].rows for own in data], [own[split] for own in scores], folds)
        source = open_source(config.data, split, Path(config.data.cache_dir).expanduser())
        _show(split, write_split(target, split, source, scored, names, config.data.columns), target)
        trained_on = split == config.data.dataset_train_split and config.annotate.models is None
        kind = "" if not trained_on else ", cross-fitted" if folds is not None else SEEN
        margins[f"{split}{kind}"] = margins_of(scored.combined)
        if scored.seen is not None:
            margins[f"{split}{SEEN}"] = scored.seen
    print(f"report {write_calibration_report(margins, target / 'report.html')}", flush=True)


def judges_of(config: Config) -> list[RewardCheckpoint]:
    """The reward models that the config asks for."""
    if config.annotate.folds is not None:
        folds = range(config.annotate.folds)
        return [RewardCheckpoint(fold_config(config, fold), fold=fold) for fold in folds]
    if config.annotate.models is None:
        return [RewardCheckpoint(config)]
    out, peft = [], config.peft and config.peft.of_given_models()
    for name in config.annotate.models:
        update = {"model_name_or_path": model_folder("annotate.models", name), "init_config": None}
        model = config.model.model_copy(update={**update, "tokenizer_name_or_path": None})
        out.append(RewardCheckpoint(config.model_copy(update={"model": model, "peft": peft}), given=True))
    return out


def fold_config(config: Config, fold: int) -> Config:
    """The config of the run that is trained without this fold."""
    data = config.data.model_copy(update={"folds": config.annotate.folds, "fold": fold})
    folder = str(Path(config.output_dir) / f"fold-{fold}")
    return config.model_copy(update={"data": data, "annotate": AnnotateConfig(), "output_dir": folder})


def load_pairs(config: Config) -> tuple[dict[str, GroupDataset], dict[str, Callable[[], Report]]]:
    """The pairs of every split that the config names, all folds of them, and functions that give what was
    read and dropped."""
    tokenizer = load_tokenizer(config.model)
    splits = [config.data.dataset_train_split, test_split(config.data)]
    known = known_tokens(config, tokenizer)
    loaded = {
        split: load_groups(config.data, split, tokenizer, known_tokens=known)
        for split in splits
        if split is not None
    }
    data = {split: groups for split, (groups, _) in loaded.items()}
    plain = config.model_copy(update={"objective": BradleyTerryParams()})  # needs no margins in the data
    for groups in data.values():
        budget, shares = config.train.row_tokens, config.model.prefix_sharing
        check_groups(groups, plain.bound_objective, budget, shares)
        if several := int((groups.counts.edges > 1).sum()):
            raise UserError(
                f"{groups.name}: annotate writes one margin a row, and there are several comparisons in "
                f"{counted(several, 'row')}; set data.edges=best_worst, or write the rows as pairs"
            )
    return data, {split: report for split, (_, report) in loaded.items()}


def _score(
    judge: RewardCheckpoint, data: dict[str, GroupDataset], shard: Shard
) -> tuple[str, dict[str, np.ndarray]]:
    """Load a reward model, score all pairs, release it.

    Returns its name, and split -> (G, 2) the scores of every group's chosen and rejected completion.
    """
    config = judge.config.model_copy(update={"objective": BradleyTerryParams()})
    checkpoints = Path(config.output_dir) / "checkpoints"
    chosen = None if judge.given else choose(checkpoints, _identity(judge, data, shard), shard)
    engine = start_engine(config, load_tokenizer(config.model), training=chosen is not None)
    assert isinstance(engine.module, RewardModel)
    if chosen:
        _check_finished(judge, data, load(engine, chosen))
    elif judge.fold is not None:
        raise UserError(
            f"{checkpoints}: no checkpoint; madpo annotate trains the folds on one machine, elsewhere run "
            f"--task reward first, with annotate={{}} output_dir={config.output_dir} "
            f"data.folds={config.data.folds} data.fold={judge.fold}"
        )
    elif engine.module.has_new_layer:
        raise UserError(
            f"{checkpoints}: no checkpoint, and {config.model.model_name_or_path} is no reward "
            "model; train first, or name one"
        )
    scores = {}
    for split, groups in data.items():
        check_positions(engine.module.policy, groups)
        flat = completion_scores(engine, groups, config, shard).numpy()
        firsts = np.cumsum(groups.counts.sequences) - groups.counts.sequences
        scores[split] = flat[firsts[:, None] + np.stack(groups.edge_ends, axis=1)]
    engine.release()
    return str(chosen.folder) if chosen else str(config.model.model_name_or_path), scores


def _identity(judge: RewardCheckpoint, data: dict[str, GroupDataset], shard: Shard) -> dict[str, Any]:
    """The identity that the checkpoint must have.

    A fold's is the whole identity of its run, data included: no example may be scored by a model that was
    trained on it.
    """
    if judge.fold is None:
        return model_identity(judge.config, shard)
    return identity(judge.config, shard, content_of(_training_groups(judge, data)))


def _training_groups(judge: RewardCheckpoint, data: dict[str, GroupDataset]) -> TokenDataset:
    config = judge.config
    assert config.data.folds is not None and judge.fold is not None
    groups = without_fold(data[config.data.dataset_train_split], config.data.folds, judge.fold)
    return merged(groups, config)


def _check_finished(judge: RewardCheckpoint, data: dict[str, GroupDataset], state: TrainState) -> None:
    if judge.fold is None:
        return
    steps = run_length(judge.config, len(_training_groups(judge, data))).total_steps
    if state.step < steps:
        raise UserError(
            f"{judge.config.output_dir}: step {state.step} of {steps}; continue it before its model scores"
        )


@torch.no_grad()
def completion_scores(engine: Engine, groups: GroupDataset, config: Config, shard: Shard) -> torch.Tensor:
    """Scores (S,) of every completion, in the order of the groups, on all ranks."""
    engine.eval()
    first, rules = 0, step_rules(config, engine.module)
    scores = torch.zeros(int(groups.counts.sequences.sum()), dtype=torch.float64, device=engine.device)
    for step in evaluation_steps(groups, rules, config.train.global_batch_size, shard):
        for batch in (batch.to(engine.device) for batch in step.batches):
            token_scores = engine(batch, Mode.SCORE).tokens.token_logps
            sums = segment_sum(token_scores, batch.seq_lengths)
            scores[first + batch.sequence_positions] = sums[: len(batch.sequence_positions)]
        first += step.num_sequences
    torch_dist.all_reduce(scores)
    return scores.cpu()


def _show(split: str, facts: dict[str, Any], target: Path) -> None:
    low, middle, high = (facts["margin_quantiles"][q] for q in ("0.05", "0.5", "0.95"))
    models = facts["models"]
    seen = ""
    if "in_sample" in facts:
        seen = f" ({facts['in_sample']['accuracy']:.1%} by the models that were trained on them)"
    left_out = f" ({facts['not_finite']} have no finite score)" if facts["not_finite"] else ""
    Console(highlight=False, soft_wrap=True).print(
        f"{split}: {facts['scored']} of {facts['rows']} examples scored by "
        f"{models[0] if len(models) == 1 else f'{len(models)} models'}{left_out}; chosen above "
        f"rejected in {facts['accuracy']:.1%} of the pairs{seen}; "
        f"margins {low:.2f} .. {middle:.2f} .. {high:.2f} (5 %, median, 95 %)\n"
        f"  next stage: data.dataset_name={target}",
        markup=False,
    )
