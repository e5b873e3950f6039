"""All files of a split in a folder are read, or refused: none is left out or mixed in without a word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from madpo.trainer.config.data import DataConfig
from madpo.trainer.data.split_files import split_files
from madpo.trainer.errors import UserError

SAVED = ("train/state.json", "train/data-00000-of-00001.arrow")


def folder_of(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        parts = [{"filename": "data-00000-of-00001.arrow"}]
        file.write_text(json.dumps({"_data_files": parts}) if file.name == "state.json" else "")
    return folder


def read(folder: Path, names: tuple[str, ...], split: str = "train") -> list[str]:
    files = split_files(DataConfig(dataset_name=str(folder_of(folder, names))), split)
    return [str(file.relative_to(folder)) for file in files or []]


COUNTED = ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet")
HASHED = ("train-00000-of-00002-0123456789abcdef.parquet", "train-00001-of-00002-fedcba9876543210.parquet")


@pytest.mark.parametrize(
    "names",
    [
        COUNTED,
        HASHED,
        ("train-0.parquet", "train-2.parquet"),
        ("train-2021-0.parquet", "train-2022-0.parquet"),
        ("train-a.parquet", "train-b.parquet"),
        ("train-sft-00000-of-00001.parquet",),
    ],
)
def test_parts_of_a_split_are_read_in_order(tmp_path, names):
    assert read(tmp_path, (*names, "test-00000-of-00001.parquet", "README.md")) == sorted(names)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (COUNTED[:1], "is 1 of 2 files, without number 1; put"),
        (HASHED[1:], "is 1 of 2 files, without number 0; put"),
        (
            (*COUNTED, "train-00000-of-00001.parquet"),
            "several splits, or of one that was written several times",
        ),
        ((*COUNTED, HASHED[0]), "several times"),
        ((*COUNTED, "train-sft-00000-of-00001.parquet"), "several splits"),
        ((*COUNTED, "train-more.parquet"), "several splits"),
        (("train-0.parquet", "train-sft-0.parquet"), "name its split in data.dataset_train_split"),
        (
            ("train.jsonl", "train-00001.jsonl"),
            "stands there twice: train.jsonl, train-00001.jsonl; leave one",
        ),
        (("train.jsonl", "train_part2.jsonl"), "stands there twice"),
        (("train.jsonl", "train_1.parquet"), "stands there twice"),
        (("train.parquet", "train-0.parquet"), "stands there twice"),
        (("train.jsonl", *SAVED), "twice: train.jsonl, train/data-00000-of-00001.arrow"),
        (("train-0.parquet", *SAVED), "stands there twice"),
        (("state.json", "train.jsonl"), "twice: state.json, train.jsonl"),
        (("train-0.jsonl", "train-1.jsonl"), "train-0.jsonl, train-1.jsonl; join those of JSON lines"),
        (("train.json",), "no split 'train'; expected"),
    ],
)
def test_what_is_not_one_whole_split_is_refused(tmp_path, names, told):
    with pytest.raises(UserError) as refused:
        read(tmp_path, names)
    assert told in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["https://example.com/train.jsonl", "s3://bucket/set"])
def test_a_url_is_told_from_a_file_that_is_not_there(name):
    with pytest.raises(UserError, match=rf"^data.dataset_name: {name}: a URL is not read; download"):
        split_files(DataConfig(dataset_name=name), "train")


@pytest.mark.parametrize("other", ["train_small.jsonl", "train-v1.jsonl", "train.csv", "training-0.jsonl"])
def test_files_of_other_names_are_no_part_of_it(tmp_path, other):
    assert read(tmp_path, ("train.jsonl", other)) == ["train.jsonl"]
