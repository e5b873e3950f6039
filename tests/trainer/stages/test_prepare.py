"""`madpo prepare`: what a start would wait for is done before, and is looked at."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from commands import command
from harness import make_config, save_model, write_pairs

from madpo.trainer.config.schema import dump, load
from madpo.trainer.data import known_splits, source, tokenised_cache
from madpo.trainer.data.training_data import load_data
from madpo.trainer.model.tokenizer import load_tokenizer


@pytest.fixture
def config(tmp_path, tokenizer_folder, monkeypatch) -> Path:
    save_model(tmp_path / "model", tokenizer_folder, seed=1)
    monkeypatch.setattr(known_splits, "SECONDS_UNTIL_SETTLED", 0.0)
    for split, rows in (("train", 12), ("test", 5)):
        write_pairs(tmp_path / "pairs" / f"{split}.jsonl", rows, seed=rows)
    tree = {
        "model": {"model_name_or_path": str(tmp_path / "model")},
        "data": {"dataset_name": str(tmp_path / "pairs")},
    }
    path = tmp_path / "c.yaml"
    path.write_text(dump(make_config(tmp_path, tree)))
    return path


def refused(*_: Any) -> Any:
    raise AssertionError("it was read")


def test_training_opens_what_was_prepared(config, monkeypatch):
    status, out, errors = command("prepare", str(config))
    assert status == 0, errors
    assert re.search(r"training: 12 groups, \d+ tokens\nheld-out: 5 groups, \d+ tokens\nprepared in", out)
    for name in ("open_source", "FileLock", "tokenise_all"):
        monkeypatch.setattr(tokenised_cache, name, refused)
    monkeypatch.setattr(source, "hash_of_file", refused)
    resolved = load(config)
    data = load_data(resolved, load_tokenizer(resolved.model), training=True)
    assert data.train is not None and len(data.train) == 12
    assert data.report["train"]["rows"] == 12


def test_verify_reads_all_and_makes_anew_what_is_damaged(config):
    command("prepare", str(config))
    cache = Path(load(config).data.cache_dir)
    assert "damaged" not in command("prepare", str(config), "--verify")[2]
    table = next(cache.glob("groups-*/data-*.arrow"))
    content = table.read_bytes()
    table.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    status, _, errors = command("prepare", str(config), "--verify")
    assert status == 0 and errors.count("damaged cache") == 1 and table.name in errors
    assert table.read_bytes() == content


def test_rows_that_cannot_be_read_end_it_as_they_would_end_training(config):
    path = config.parent / "pairs" / "train.jsonl"
    path.write_text(path.read_text() + '{"prompt": "a", "chosen": 3, "rejected": "b"}\n')
    status, _, errors = command("prepare", str(config))
    assert status == 3 and "train.jsonl:13: chosen: expected text" in errors
    assert command("prepare", str(config), "data.on_bad_row=drop")[0] == 0


def test_a_model_that_cannot_be_fetched_is_named(config, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, _, errors = command("prepare", str(config), "model.model_name_or_path=nobody/nothing")
    assert status == 2 and errors.startswith("error: model.model_name_or_path: nobody/nothing")
