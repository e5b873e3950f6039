"""The split that is held out where the config leaves that open, and Parquet files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from madpo.trainer.config.data import DataConfig
from madpo.trainer.data import source
from madpo.trainer.data.source import open_source
from madpo.trainer.data.source import test_split as held_out_split
from madpo.trainer.errors import UserError


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["train.jsonl", "test.jsonl"], "test"),
        (["train.jsonl", "validation.parquet"], "validation"),
        (["train.jsonl", "validation.jsonl", "test-00000-of-00001.parquet"], "test"),
        (["train.jsonl", "tests.jsonl", "test.txt"], None),
    ],
)
def test_auto_holds_out_test_or_validation_if_it_is_there(tmp_path, files, found):
    for name in files:
        (tmp_path / name).touch()
    data = DataConfig(dataset_name=str(tmp_path))
    assert held_out_split(data) == found
    assert held_out_split(data.model_copy(update={"dataset_test_split": None})) is None
    assert held_out_split(data.model_copy(update={"dataset_test_split": "mine"})) == "mine"


def test_the_training_split_is_never_held_out(tmp_path):
    for name in ("test.jsonl", "validation.jsonl"):
        (tmp_path / name).touch()
    data = DataConfig(dataset_name=str(tmp_path), dataset_train_split="test")
    assert held_out_split(data) == "validation"


def test_a_single_file_holds_nothing_out(tmp_path):
    assert held_out_split(DataConfig(dataset_name=str(tmp_path / "pairs.jsonl"))) is None


def test_a_data_set_on_the_hub_is_asked_once_for_its_splits(monkeypatch):
    asked = []

    def names(name, config):
        asked.append((name, config))
        if name == "none/there":
            raise ConnectionError("offline")
        return ["train_prefs", "validation"]

    monkeypatch.setattr(datasets, "get_dataset_split_names", names)
    source._splits_on_hub.cache_clear()
    data = DataConfig(dataset_name="some/pairs", dataset_config="part")
    assert [held_out_split(data), held_out_split(data)] == ["validation"] * 2
    assert asked == [("some/pairs", "part")]
    with pytest.raises(UserError, match=r"data\.dataset_name: 'none/there' is no local .* offline"):
        held_out_split(DataConfig(dataset_name="none/there"))


PAIR = {"prompt": ["a"], "chosen": [" b"], "rejected": [" c"]}


def shards(folder: Path, *tables: dict[str, Any]) -> DataConfig:
    folder.mkdir(exist_ok=True)
    for number, table in enumerate(tables):
        pq.write_table(pa.table(table), folder / f"train-{number:05d}-of-{len(tables):05d}.parquet")
    return DataConfig(dataset_name=str(folder))


def rows(data: DataConfig, cache: Path) -> list[dict[str, Any]]:
    return open_source(data, "train", cache).rows.to_list()


def test_shards_of_whole_and_broken_numbers_are_one_set(tmp_path):
    """Where no margin of a shard has a fraction, its writer may have made the column one of integers."""
    data = shards(
        tmp_path / "d", {**PAIR, "margin": pa.array([2], pa.int64())}, {**PAIR, "margin": pa.array([1.5])}
    )
    assert [row["margin"] for row in rows(data, tmp_path / "cache")] == [2.0, 1.5]
    opened = source.open_source(data, "train", tmp_path / "cache")
    assert opened.name.endswith("train-00000-of-00002.parquet and 1 more")
    assert opened.where(1).endswith("train-00001-of-00002.parquet row 0")


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        (
            [{**PAIR, "margin": ["2"]}, {**PAIR, "margin": [1.5]}],
            "00001-of-00002.parquet: column margin is double",
        ),
        (
            [{name: pa.array([], pa.string()) for name in PAIR}],
            "00000-of-00001.parquet: the file has no rows",
        ),
    ],
)
def test_shards_that_cannot_be_one_set_are_named(tmp_path, tables, said):
    with pytest.raises(UserError, match=said):
        rows(shards(tmp_path / "d", *tables), tmp_path / "cache")


def test_a_column_that_a_shard_lacks_is_null_there(tmp_path):
    data = shards(tmp_path / "d", {**PAIR, "margin": [2.0]}, PAIR)
    assert [row["margin"] for row in rows(data, tmp_path / "cache")] == [2.0, None]


@pytest.mark.parametrize("kept", [0, 10, -40])
def test_a_damaged_parquet_file_is_named(tmp_path, kept):
    data = shards(tmp_path / "d", PAIR, PAIR)
    file = tmp_path / "d" / "train-00001-of-00002.parquet"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"train-00001-of-00002\.parquet: cannot be read as Parquet: "):
        rows(data, tmp_path / "cache")


def test_another_file_of_the_same_name_and_time_is_read_anew(tmp_path):
    """Archives and image layers have fixed times, which datasets' own cache goes by."""
    data = shards(tmp_path / "d", PAIR)
    file = tmp_path / "d" / "train-00000-of-00001.parquet"
    os.utime(file, (1, 1))
    assert rows(data, tmp_path / "cache")[0]["chosen"] == " b"
    shards(tmp_path / "d", {**PAIR, "chosen": [" d"]})
    os.utime(file, (1, 1))
    assert rows(data, tmp_path / "cache")[0]["chosen"] == " d"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_kept_rows_that_were_damaged_are_read_anew_and_named(tmp_path, capsys, suffix):
    """Also where equal files of two names are kept together."""
    files = [tmp_path / f"{name}{suffix}" for name in ("one", "two")]
    for file in files:
        if suffix == ".jsonl":
            file.write_text('{"prompt": "where is it"}\n')
        else:
            pq.write_table(pa.table({"prompt": ["where is it"]}), file)
    configs = [DataConfig(dataset_name=str(file)) for file in files * 2]
    want, *others = [open_source(config, "train", tmp_path / "kept").rows[0] for config in configs]
    assert others == [want] * 3 and capsys.readouterr().err == ""
    for kept in (tmp_path / "kept").rglob("*.arrow"):
        kept.write_bytes(kept.read_bytes().replace(b"where is it", b"where was I"))
    assert open_source(configs[0], "train", tmp_path / "kept").rows[0] == want
    assert capsys.readouterr().err.count("damaged cache") == 1
