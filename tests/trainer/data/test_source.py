"""Which split is held out where the config leaves that open."""

from __future__ import annotations

import datasets
import pytest

from madpo.trainer.config.data import DataConfig
from madpo.trainer.data import source
from madpo.trainer.data.source import test_split as held_out_split
from madpo.trainer.errors import UserError


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["train.jsonl", "test.jsonl"], "test"),
        (["train.jsonl", "validation.parquet"], "validation"),
        (["train.jsonl", "validation.jsonl", "test-00000-of-00002.parquet"], "test"),
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
