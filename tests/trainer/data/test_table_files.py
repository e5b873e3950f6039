"""Files as users bring them: read, or refused in one line that names file and row."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import make_config

from madpo.trainer.data.table_files import place_of
from madpo.trainer.data.training_data import load_data
from madpo.trainer.errors import UserError

PAIRS = {"prompt": ["a:", "b:"], "chosen": [" good", " fine"], "rejected": [" bad", " dull"]}
LINE = '{"prompt": "a:", "chosen": " good", "rejected": " bad"}\n'


def table(**columns: Any) -> Callable[[Path], Path]:
    """A Parquet file of two pairs with these columns in place of their own."""

    def make(folder: Path) -> Path:
        pq.write_table(pa.table({**PAIRS, **columns}), folder / "pairs.parquet")
        return folder / "pairs.parquet"

    return make


def damaged(folder: Path) -> Path:
    """Parquet that is sound at both ends."""
    file = folder / "pairs.parquet"
    pq.write_table(pa.table({name: column * 999 for name, column in PAIRS.items()}), file)
    raw = bytearray(file.read_bytes())
    raw[4:200] = bytes(196)
    file.write_bytes(raw)
    return file


def saved(folder: Path) -> Path:
    datasets.Dataset.from_dict(PAIRS).save_to_disk(folder / "saved")
    return folder / "saved"


def saved_splits(folder: Path) -> Path:
    pairs = datasets.Dataset.from_dict(PAIRS)
    datasets.DatasetDict({"train": pairs, "test": pairs.select([1])}).save_to_disk(folder / "saved")
    return folder / "saved"


def saved_in_part(folder: Path) -> Path:
    (file,) = saved(folder).glob("*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    return file.parent


def saved_and_gone(folder: Path) -> Path:
    (file,) = saved(folder).glob("*.arrow")
    file.unlink()
    return file.parent


def not_utf8() -> pa.Array:
    offsets, text = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")
    return pa.Array.from_buffers(pa.string(), 2, [None, offsets, text])


CASES: dict[str, tuple[Callable[[Path], Path], str | None]] = {
    "decimal": (
        table(margin=[Decimal("1.5"), Decimal(2)], when=[date(2026, 1, 1)] * 2, x=[b"\xff"] * 2),
        None,
    ),
    "categories": (table(chosen=pa.array([" c", " d"]).dictionary_encode()), None),
    "date": (table(margin=[date(2026, 1, 1)] * 2), r"pairs\.parquet row 0: margin: .* got datetime\.date"),
    "NaN": (table(margin=[1.0, float("nan")]), r"pairs\.parquet row 1: margin: .* finite number, got nan"),
    "bytes": (table(chosen=[b" c", "\u00e9 d".encode()]), None),
    "other bytes": (
        table(chosen=[b" c", b"\xff"]),
        r"pairs\.parquet row 1: chosen: .* bytes that are no UTF-8",
    ),
    "not UTF-8": (table(chosen=not_utf8()), r"pairs\.parquet row 1: UnicodeDecodeError: "),
    "nulls": (table(rejected=pa.nulls(2)), r"pairs\.parquet row 0: rejected: .* got None"),
    "map": (table(x=pa.array([[("a", 1)]] * 2, pa.map_(pa.string(), pa.int8()))), r"\.parquet: column x is"),
    "damaged": (damaged, r"pairs\.parquet: "),
    "saved": (saved, None),
    "saved in part": (saved_in_part, r"saved.*: cannot be read"),
    "saved and gone": (saved_and_gone, r"saved.*: cannot be read"),
}


STREAMED = {"decimal", "not UTF-8", "damaged", "saved", "saved and gone"}
"""Cases that are tried in a stream too."""


def reports(
    folder: Path, tokenizer: Any, data: dict[str, Any], objective: str = "dpo"
) -> dict[str, dict[str, Any]]:
    tree = {
        "model": {"model_name_or_path": "unused"},
        "data": data,
        "objective": {"loss_type": objective},
        "train": {"max_steps": 1},
    }
    return load_data(make_config(folder, tree), tokenizer, training=True).report


@pytest.mark.parametrize(
    ("name", "streaming"),
    [(name, False) for name in CASES] + [(name, True) for name in sorted(STREAMED)],
)
def test_a_file_is_read_or_refused_in_one_line(tmp_path, tokenizer, name, streaming):
    make, message = CASES[name]
    data = {"dataset_name": str(make(tmp_path)), "streaming": streaming}
    if message is None:
        report = reports(tmp_path, tokenizer, data)["train"]
        assert report["groups"] == 2 and not report["dropped"]
        assert report.get("odd_texts", {}) == (
            {"bytes were read as UTF-8 text": 2} if name == "bytes" else {}
        )
        return
    with pytest.raises(UserError, match=message) as refused:
        reports(tmp_path, tokenizer, data)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def with_field(field: str) -> bytes:
    return f"{LINE.strip()[:-1]}, {field}}}".encode()


BAD_LINES = [
    (LINE.strip().replace("good", "\\ud83d").encode(), "text holds half a character"),
    (with_field('"margin": 1e300'), "margin: expected a finite number, got 1e+300, which is too large"),
    (with_field('"margin": ' + "9" * 5000), "not JSON that can be read: a number has thousands of digits"),
    (b'{"prompt": "' + b"x" * 9_000_000, "not JSON: Unterminated string"),
    (json.dumps({"chosen": ["x" * 9_000_000]}).encode(), "chosen: a message needs text"),
    (bytes(range(14, 255)), "not UTF-8"),
    (b"[]", "expected a JSON object, got list"),
]


@pytest.mark.parametrize("objective", ["dpo", "nll"])
def test_every_line_that_is_no_row_is_named(tmp_path, tokenizer, objective):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join([LINE.strip().encode(), *(line for line, _ in BAD_LINES)]))
    data = {"dataset_name": str(path), "on_bad_row": "drop", "streaming": objective == "nll"}
    report = reports(tmp_path, tokenizer, data, objective)["train"]
    assert report["groups"] == 1 and report["dropped"] == {"unreadable": len(BAD_LINES)}
    for number, (place, (_, message)) in enumerate(
        zip(report["where"]["unreadable"], BAD_LINES, strict=True), 2
    ):
        assert place.startswith(f"{path}:{number}: {message}") and len(place) < len(str(path)) + 250


def test_a_saved_set_of_splits_has_a_held_out_one(tmp_path, tokenizer):
    found = reports(tmp_path, tokenizer, {"dataset_name": str(saved_splits(tmp_path))})
    assert {split: report["groups"] for split, report in found.items()} == {"train": 2, "test": 1}


def test_a_row_is_named_by_the_shard_that_it_is_in(tmp_path, tokenizer):
    files = [tmp_path / f"train-{number:05d}-of-00003.parquet" for number in range(3)]
    for file in files:
        pq.write_table(pa.table(PAIRS if file != files[2] else {**PAIRS, "chosen": [" c", ""]}), file)
    assert [place_of(files, row) for row in (0, 3, 5)] == [
        f"{files[0]} row 0",
        f"{files[1]} row 1",
        f"{files[2]} row 1",
    ]
    for data in ({}, {"streaming": True, "stream_block": 6}):
        with pytest.raises(UserError, match=rf"{files[2]} row 1: chosen is empty"):
            reports(tmp_path, tokenizer, {"dataset_name": str(tmp_path), **data})
