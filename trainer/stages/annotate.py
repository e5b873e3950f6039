"""Margins from a reward model: a data set's pairs, scored, as the next stage reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_dist
from rich.console import Console

from madpo.trainer import checkpoint, dist
from madpo.trainer.config import Config
from madpo.trainer.data.dataset import GroupDataset, load_groups
from madpo.trainer.data.formats import MARGIN_COLUMNS, parse_json_line
from madpo.trainer.data.loader import evaluation_steps
from madpo.trainer.data.source import Source, open_source
from madpo.trainer.dist import Shard, barrier
from madpo.trainer.errors import UserError
from madpo.trainer.model.load import load_tokenizer
from madpo.trainer.objectives.base import segment_sum
from madpo.trainer.objectives.reward import BradleyTerryParams
from madpo.trainer.stages.setup import start_engine


def run_annotation(config: Config) -> None:
    """Write `<output_dir>/annotated/<split>.jsonl` for the splits that the config names, by the newest
    checkpoint of the reward run in `output_dir`, or by the model it names if there is none.

    Every row of the source is there, with `score_chosen`, `score_rejected` and `margin` where it could be
    scored. What the source gave as a margin or score is kept under `..._given`, so that one scale is left.
    Raises ValueError.
    """
    if "scores" not in config.objective_entry.needs:
        raise UserError(
            f"objective.loss_type: annotate takes the config of a reward run (bradley_terry), not of "
            f"{config.objective.loss_type}"
        )
    if config.data.datasets is not None:
        raise UserError(
            "data.datasets: annotate takes one data set at a time, and writes it out whole; set "
            "data.datasets=null and data.dataset_name to each of its parts"
        )
    if config.data.streaming:
        raise UserError("data.streaming: annotate writes the whole data set; set data.streaming=false")
    config = config.model_copy(update={"objective": BradleyTerryParams()})  # which asks no margin of the data
    folder, tokenizer = Path(config.output_dir), load_tokenizer(config.model)
    splits = [config.data.dataset_train_split, config.data.dataset_test_split]
    data = {split: load_groups(config.data, split, tokenizer)[0] for split in splits if split is not None}
    for groups in data.values():
        groups.require(config.objective_entry, config.objective.loss_type, config.train.micro_batch_tokens)
    shard = dist.init(config.launch.timeout_minutes)
    tag = checkpoint.latest(folder / "checkpoints", checkpoint.model_identity(config, shard))
    engine = start_engine(config, tokenizer, training=tag is not None)
    if tag:
        checkpoint.load(engine, folder / "checkpoints", tag)
    elif getattr(engine.module.policy, "has_new_layer", True):
        raise UserError(
            f"{folder / 'checkpoints'}: no checkpoint, and {config.model.model_name_or_path} is no reward "
            "model; train first, or name one"
        )
    model = str(folder / "checkpoints" / tag) if tag else str(config.model.model_name_or_path)
    for split, groups in data.items():
        scores = completion_scores(engine, groups, config, shard)
        if shard.is_main:
            source = open_source(config.data, split, Path(config.data.cache_dir).expanduser())
            facts = _write(folder / "annotated", split, source, groups, scores.numpy(), model)
            _show(split, facts, folder / "annotated")
    barrier()
    engine.destroy()


@torch.no_grad()
def completion_scores(engine: Any, groups: GroupDataset, config: Config, shard: Shard) -> torch.Tensor:
    """(S,) the reward model's score of every completion, in the order of the groups; on all ranks."""
    engine.eval()
    train, first = config.train, 0
    scores = torch.zeros(int(groups.sequences.sum()), dtype=torch.float64, device=engine.device)
    for step in evaluation_steps(
        groups, config.objective_entry.item, train.global_batch_size, train.micro_batch_tokens, shard
    ):
        for batch in (batch.to(engine.device) for batch in step.batches):
            _, token_scores, *_ = engine(batch)
            sums = segment_sum(token_scores, batch.seq_lengths)
            scores[first + batch.sequence_places] = sums[: len(batch.sequence_places)]
        first += step.num_sequences
    torch_dist.all_reduce(scores)
    return scores.cpu()


def _write(
    target: Path,
    split: str,
    source: Source,
    groups: GroupDataset,
    scores: np.ndarray,  # (S,)
    model: str,
) -> dict[str, Any]:
    """The annotated split, and `annotation.json` beside it: by what, from what, and how the margins lie."""
    firsts = np.cumsum(groups.sequences) - groups.sequences
    found: dict[int, tuple[float, float]] = {}
    for index, (row, first) in enumerate(zip(groups.rows.tolist(), firsts.tolist(), strict=True)):
        winner, loser, _ = groups[index].edges[0]
        found[row] = float(scores[first + winner]), float(scores[first + loser])
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"{split}.jsonl"
    partial, count = path.with_suffix(".partial"), 0
    with partial.open("w", encoding="utf-8") as file:
        for number, row in _rows(source):
            count += 1
            file.write(json.dumps(_annotated(row, found.get(number)), ensure_ascii=False, default=str) + "\n")
    os.replace(partial, path)
    margins = np.array([chosen - rejected for chosen, rejected in found.values()])
    facts = {
        "model": model,
        "source": source.name,
        "fingerprint": source.fingerprint,
        "rows": count,
        "scored": len(margins),
        "accuracy": float((margins > 0).mean()),
        "margin_quantiles": {str(q): float(np.quantile(margins, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)},
    }
    note = target / "annotation.json"
    notes = json.loads(note.read_text()) if note.is_file() else {}
    note.write_text(json.dumps({**notes, split: facts}, indent=2) + "\n")
    return facts


def _rows(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    """(the number that a group knows its row by, the row); a line that cannot be read is left out."""
    row: Any
    for index, row in enumerate(source.rows):
        if source.unit != "line":
            yield index, row
            continue
        try:
            yield row["line"], parse_json_line(row["raw"])
        except UserError:
            continue


def _annotated(row: dict[str, Any], scores: tuple[float, float] | None) -> dict[str, Any]:
    row = {f"{key}_given" if key in MARGIN_COLUMNS else key: value for key, value in row.items()}
    if scores is None:
        return row
    return {**row, "score_chosen": scores[0], "score_rejected": scores[1], "margin": scores[0] - scores[1]}


def _show(split: str, facts: dict[str, Any], target: Path) -> None:
    low, middle, high = (facts["margin_quantiles"][q] for q in ("0.05", "0.5", "0.95"))
    Console(highlight=False, soft_wrap=True).print(
        f"{split}: {facts['scored']} of {facts['rows']} rows scored by {facts['model']}; chosen above "
        f"rejected in {facts['accuracy']:.1%}; margins {low:.2f} .. {middle:.2f} .. {high:.2f} "
        f"(5 %, median, 95 %)\n"
        f"  next stage: data.dataset_name={target}",
        markup=False,
    )
