"""What one rank does before its first step, and for each step, with millions of rows and a thousand ranks.

    python -m madpo.benchmarks.scale.run FOLDER [--rows 1000000] [--groups 8192] [--ranks 1024]

No rank waits for another one here, so what a rank does alone is what it does beside a thousand others. The
rows are a few thousand real ones, tokenised by the trainer, over and over: with other numbers, prompts and
claims. The source of the data is never read, so its size does not matter.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from madpo.trainer.batches.steps import StepRules, plan_step
from madpo.trainer.config.schema import Config, from_tree
from madpo.trainer.data import known_splits
from madpo.trainer.data.dataset import store_columns
from madpo.trainer.data.known_splits import KnownSplit
from madpo.trainer.data.source import Origin
from madpo.trainer.data.tokenised_cache import groups_key, read_table, rules_of
from madpo.trainer.data.training_data import load_data, weighed
from madpo.trainer.dist import Shard
from madpo.trainer.files import seal
from madpo.trainer.objectives.base import Item

BASE_ROWS = 4_000
EXTRAPOLATED = 10_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the data and the cache are; kept for the next time")
    parser.add_argument("--tokenizer", required=True, help="name or folder of a tokenizer")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--groups", type=int, default=8_192, help="of a step")
    parser.add_argument("--ranks", type=int, default=1_024)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    config = _config(args.folder)
    _make_data(config, tokenizer, args.rows)
    _measure(config, tokenizer, args.rows, args.groups, args.ranks)


def _config(folder: Path) -> Config:
    return from_tree(
        {
            "model": {"model_name_or_path": "none"},
            "data": {
                "dataset_name": str(folder / "rows.jsonl"),
                "dataset_test_split": None,
                "cache_dir": str(folder / "cache"),
            },
            "objective": {"loss_type": "madpo"},
            "train": {"micro_batch_tokens": 8192},
            "output_dir": str(folder / "run"),
        },
        origin="the benchmark",
    )


def _make_data(config: Config, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Put a table of `rows` rows where the trainer looks for that of the source, unless it is there."""
    source, cache = Path(str(config.data.dataset_name)), Path(config.data.cache_dir)
    if not source.exists():
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text("".join(_row(np.random.default_rng(n), n) for n in range(BASE_ROWS)))
        time.sleep(known_splits.SECONDS_UNTIL_SETTLED)
    known = KnownSplit(cache, [source], groups_key("", tokenizer, rules_of(config.data)))
    path = cache / f"groups-{rows}-rows"
    if not path.is_dir():
        known_splits.forget(cache)
        _, base, _ = read_table(config.data, "train", tokenizer)
        table = _repeated(base, rows)
        table.save_to_disk(str(path))
        store_columns(table, path)
        seal(path)
    known.note(known.facts(), Origin(str(source), "line"), path)


def _row(random: np.random.Generator, number: int) -> str:
    """A pair whose texts are about as long as those of UltraFeedback."""
    words = [
        "the",
        "film",
        "was",
        "good",
        "and",
        "dull",
        "but",
        "warm",
        "cold",
        "fine",
        "plot",
        "actor",
        "story",
    ]

    def text(mean: float) -> str:
        return " ".join(random.choice(words, int(np.clip(random.lognormal(mean, 0.8), 3, 400))))

    row = {"prompt": f"{number} {text(4.5)}", "chosen": f" yes {text(5)}", "rejected": f" no {text(4.9)}"}
    return json.dumps(row | {"margin": float(random.normal(1, 2))}) + "\n"


def _repeated(base: datasets.Dataset, rows: int) -> datasets.Dataset:
    """The rows of the table over and over, each with a number, a prompt and claims of its own."""
    pieces = []
    for first in range(0, rows, len(base)):
        piece: pa.Table = base.data.table.combine_chunks().slice(0, min(len(base), rows - first))
        random = np.random.default_rng(first)
        claims = piece.column("claims").combine_chunks()
        other = pa.array(random.integers(0, 2**62, len(claims.flatten())) * 2)
        own = {
            "row": pa.array(np.arange(first, first + len(piece))),
            "prompt_hash": pa.array(random.integers(0, 2**62, len(piece))),
            "claims": pa.ListArray.from_arrays(claims.offsets, other),
        }
        for name, column in own.items():
            index = piece.schema.get_field_index(name)
            piece = piece.set_column(index, piece.schema.field(index), column)
        pieces.append(piece)
    return datasets.Dataset(pa.concat_tables(pieces))  # pyright: ignore[reportArgumentType]


def _measure(config: Config, tokenizer: PreTrainedTokenizerBase, rows: int, groups: int, ranks: int) -> None:
    times = EXTRAPOLATED / rows
    print(f"{rows:,} rows; in brackets for {EXTRAPOLATED:,}")

    @contextmanager
    def timed(name: str, of_rows: bool = False) -> Iterator[None]:
        cpu, memory = time.process_time(), _own_memory()
        yield
        cpu, memory = time.process_time() - cpu, _own_memory() - memory
        more = f"({cpu * times:5.2f} CPU s, {memory / rows:3.0f} bytes a row)" if of_rows else ""
        print(f"{name:60}{cpu:7.3f} CPU s {memory / 2**20:7.1f} MiB {more}", flush=True)

    with timed("start: load_data, weighed, the first epoch's order", of_rows=True):
        data = weighed(load_data(config, tokenizer, training=True), config)
        assert data.source is not None and data.train is not None
        read, indices = data.source.take(0, groups)
    with timed("the report, on rank 0 alone", of_rows=True):
        json.dumps(data.report)
    rules, shard = StepRules(Item.EDGE, config.train.row_tokens), Shard(ranks // 2, ranks)
    for name in ("cold", "warm"):
        with timed(f"lengths of the {groups:,} groups of a step, {name}"):
            read.shapes(indices)
    for _ in range(2):
        with timed(f"a step of {groups:,} groups planned and packed for {ranks:,} ranks"):
            plan_step(read, indices, rules, shard)


def _own_memory() -> int:
    """Bytes of memory that this process shares with no file and no other process."""
    lines: Any = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) * 1024


if __name__ == "__main__":
    main()
