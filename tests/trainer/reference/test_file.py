"""The file of a reference's log-probs: what it is named by, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commits import Commits, no_rename
from harness import make_config, save_model, write_pairs
from lora_cases import changed, stored_adapter

from madpo.trainer.config.schema import Config
from madpo.trainer.data.training_data import load_data
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.reference import file as reference_file
from madpo.trainer.reference import model as of_model
from madpo.trainer.reference.cached import cache_key
from madpo.trainer.reference.file import path_of, read, why_not_reused, write
from madpo.trainer.reference.model import weights_of_reference

PARTS = {"data": "groups-1", "dtype": "fp32", "weights": {"config.json": "ab"}}
LOGPS = -np.arange(1, 200, dtype=np.float32)


@pytest.fixture
def path(tmp_path) -> Path:
    path = path_of(tmp_path / "cache", PARTS)
    write(path, LOGPS, PARTS)
    return path


def test_what_was_written_is_read_without_a_copy(path):
    got = read(path, PARTS, len(LOGPS))
    assert np.array_equal(got, LOGPS) and not got.flags.owndata
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing partial is left"
    with reference_file.safe_open(path, "np") as file:
        assert json.loads(file.metadata()["parts"]) == PARTS


def test_a_damaged_file_is_refused(path):
    whole = path.read_bytes()
    for damaged, message in (
        (whole[:-4], "can be read"),
        (whole[:20], "can be read"),
        (b"", "can be read"),
        (whole[:-4] + b"\0\0\0\0", "not those that were written"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{path.name}: .*{message}.*delete it"):
            read(path, PARTS, len(LOGPS))


def test_a_file_without_our_header_is_refused(path):
    reference_file.save_file({"token_logps": torch.from_numpy(LOGPS)}, path)
    with pytest.raises(ValueError, match="can be read"):
        read(path, PARTS, len(LOGPS))


def test_a_file_of_something_else_says_by_what_it_differs(path):
    """A file that was copied or renamed."""
    other = {**PARTS, "dtype": "bf16"}
    with pytest.raises(ValueError, match="of another reference or data, by dtype: 'fp32' there, 'bf16' now"):
        read(path, other, len(LOGPS))
    with pytest.raises(ValueError, match=r"shape \(199,\), 200 float32 are needed"):
        read(path, PARTS, 200)
    assert why_not_reused(path.parent, other) == f"{path.name} has other dtype"
    assert why_not_reused(path.parent / "empty", other) == ""
    (path.parent / "reference-x.safetensors").write_bytes(b"?")
    assert why_not_reused(path.parent, {**other, "data": "groups-2"}) == f"{path.name} has other data, dtype"


def test_log_probs_that_are_not_finite_are_not_kept(tmp_path):
    for bad in (np.nan, -np.inf):
        with pytest.raises(ValueError, match=r"1 of 3 completion tokens no finite log-prob"):
            write(tmp_path / "x", np.array([-1, bad, -2], np.float32), PARTS)
    assert not list(tmp_path.iterdir())


def test_the_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    commits = Commits().watch(monkeypatch)
    path = path_of(tmp_path / "cache", PARTS)
    write(path, LOGPS, PARTS)
    assert commits.calls == [("replace", path.name)] and not commits.unsynced


def test_a_file_that_is_written_in_part_is_not_there(path, monkeypatch):
    """Neither a new one nor over the one that was there."""

    def half(tensors: Any, file: Any, header: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    other = path_of(path.parent, {**PARTS, "dtype": "bf16"})
    for failing, name in ((half, "reference.file.save_file"), (no_rename, "files.os.replace")):
        for target in (path, other):
            with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
                patch.setattr(f"madpo.trainer.{name}", failing)
                write(target, 2 * LOGPS, PARTS)
            assert np.array_equal(read(path, PARTS, len(LOGPS)), LOGPS) and not other.exists()


def test_the_numbers_are_looked_at_only_if_all_are_to_be(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:-4] + b"\0\0\0\0")
    assert read(path, PARTS, len(LOGPS), verify=False)[-1] == 0.0


@pytest.fixture
def config(tmp_path, tokenizer_folder) -> Config:
    save_model(tmp_path / "start", tokenizer_folder, seed=1)
    save_model(tmp_path / "other", tokenizer_folder, seed=2)
    write_pairs(tmp_path / "train.jsonl", 6)
    return make_config(
        tmp_path,
        {
            "model": {"model_name_or_path": str(tmp_path / "start"), "reference": "cached"},
            "data": {"dataset_name": str(tmp_path / "train.jsonl")},
        },
    )


def name_for(config: Config, device: str = "cpu") -> str:
    tokenizer = load_tokenizer(config.model)
    groups = load_data(config, tokenizer, training=True).train
    assert groups is not None
    weights, attention = weights_of_reference(config), config.model.attention
    parts = cache_key(config, weights, groups, len(tokenizer), attention, torch.device(device))
    return path_of(Path("."), parts).name


KTO = {"objective": {"loss_type": "kto"}}
OTHER: dict[str, dict[str, Any]] = {
    "max_length": {"data": {"max_length": 12}},
    "eos": {"data": {"append_eos": "never"}},
    "template": {"data": {"chat_template_kwargs": {"thinking": True}}},
    "fold": {"data": {"folds": 2, "fold": 0}},
    "dtype": {"train": {"bf16": True}},
    "head": {"train": {"head_impl": "torch"}},
    "attention": {"model": {"attention": "flash"}, "train": {"bf16": True}},
    "rows": {"model": {"resize_embeddings": True}},
    "quantised": {
        "peft": {"load_in_4bit": True},
        "train": {"bf16": True},
        "deepspeed": {"zero_optimization": {"stage": 2}},
    },
    "quantised communication": {"deepspeed": {"zero_optimization": {"zero_quantized_weights": True}}},
    "mismatched": KTO,
    "mismatched by another seed": {**KTO, "seed": 7},
}
SAME: dict[str, dict[str, Any]] = {
    "objective": {"objective": {"loss_type": "ipo"}},
    "budget": {"train": {"micro_batch_tokens": 512, "head_gib": 0.5, "global_batch_size": 3}},
    "optimiser": {"optim": {"lr": 1.0}, "seed": 3, "data": {"order": "as_is"}},
    "fresh adapter": {"peft": {"lora_r": 4}},
}


def test_the_name_depends_on_all_that_decides_the_numbers(config, tmp_path):
    names = {"as it is": name_for(config)}
    for what, sections in OTHER.items():
        names[what] = name_for(changed(config, **sections))
    other = str(tmp_path / "other")
    names["named reference"] = name_for(changed(config, model={"ref_model_name_or_path": other}))
    names["device"] = name_for(config, "cuda")
    assert len(set(names.values())) == len(names), names
    assert name_for(config, "cuda:1") == names["device"]
    for what, sections in SAME.items():
        assert name_for(changed(config, **sections)) == names["as it is"], what
    assert name_for(changed(config, **KTO, train={"bf16": False})) == names["mismatched"]


def test_the_name_depends_on_every_file_of_the_reference(config, tmp_path, tokenizer_folder):
    folder, seen = tmp_path / "start", {name_for(config)}
    changes = {"model.safetensors": lambda x: x[:-1] + bytes([x[-1] ^ 1]), "config.json": scaled_logits}
    for name, change in changes.items():
        original = (folder / name).read_bytes()
        (folder / name).write_bytes(change(original))
        seen.add(name_for(config))
        (folder / name).write_bytes(original)
    (folder / "README.md").write_text("text")
    assert name_for(config) in seen and len(seen) == 3

    adapter = stored_adapter(tmp_path / "adapter", folder, tokenizer_folder)
    continued = changed(config, model={"model_name_or_path": str(adapter)})
    seen.add(name_for(continued))
    for file in (adapter / "adapter_model.safetensors", folder / "model.safetensors"):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        seen.add(name_for(continued))
    assert len(seen) == 6


def scaled_logits(config: bytes) -> bytes:
    return json.dumps({**json.loads(config), "final_logit_softcapping": 30.0}).encode()


def test_a_name_on_the_hub_is_told_by_its_commit(config, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("ab" * 20) / "config.json"
    found = {"some/model": str(snapshot), "loose": str(tmp_path / "config.json")}
    monkeypatch.setattr(of_model, "cached_file", lambda name, *_, **__: found.get(name))
    monkeypatch.setattr(of_model, "adapter_named", lambda *_: None)
    named = changed(config, model={"ref_model_name_or_path": "some/model"})
    assert weights_of_reference(named) == {"weights": {"some/model": "ab" * 20}}
    loose = changed(config, model={"ref_model_name_or_path": "loose"})
    with pytest.raises(ValueError, match="cannot tell which commit of 'loose' is used"):
        weights_of_reference(loose)
