"""Names of models and data: what they stand for, and what is refused before the hub is asked."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from madpo.trainer.config.locate import check_there, located, model_folder
from madpo.trainer.config.schema import Config

KEY = "model.model_name_or_path"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder with a model, a run that exported one, a run that did not, data; a hub that answers."""
    for folder in ("base", "runs/sft/model", "runs/reward/checkpoints", "data/pairs"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("base", "runs/sft/model"):
        (tmp_path / folder / "config.json").write_text("{}")
    (tmp_path / "data" / "train.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}")
        yield tmp_path


@pytest.mark.parametrize(
    "name, folder",
    [
        ("base", "base"),
        ("./base/", "./base/"),
        ("runs/sft", "runs/sft/model"),
        ("runs/sft/model", "runs/sft/model"),
        ("~/base", "{here}/base"),
        ("org/model", "org/model"),
        ("gpt2", "gpt2"),
    ],
)
def test_a_name_is_a_folder_a_run_or_the_hubs(here, name, folder):
    assert model_folder(KEY, name) == folder.format(here=here)


MISSING = "no such file or folder"


@pytest.mark.parametrize(
    "name, message",
    [
        ("./bsae", f"{MISSING}; did you mean base?"),
        ("~/bsae", f"{MISSING}; did you mean {{here}}/base?"),
        ("runs/stf", f"{MISSING}; did you mean runs/sft?"),
        ("runs/dpo", f"{MISSING}; {{here}}/runs holds reward, sft"),
        ("run/sft/model", f"{MISSING}; did you mean runs/sft/model?"),
        ("/nowhere/at/all", f"{MISSING}; there is no folder /nowhere/at either"),
        ("data/pears", f"{MISSING}; {{here}}/data holds pairs, train.jsonl"),
        ("data/trian.jsonl", f"{MISSING}; did you mean data/train.jsonl?"),
        ("pairs.json", f"{MISSING}; {{here}} holds base, data, runs"),
        ("bsae", f"{MISSING}; did you mean base? (If it is on the hub: hf download bsae)"),
        ("dta/pairs", f"{MISSING}; did you mean data/pairs? (If it is on the hub: hf download dta/pairs)"),
        (
            "runs/reward",
            "is the folder of a run that has exported no model; write one with `madpo export runs/reward`",
        ),
        ("data/train.jsonl", "is a file; name the folder that it is in"),
        (
            "data",
            "holds no model: no config.json and no adapter_config.json; {here}/data holds pairs, train.jsonl",
        ),
    ],
)
def test_a_slip_is_refused_with_the_key_and_the_nearest_name(here, name, message):
    with pytest.raises(ValueError) as caught:
        model_folder(KEY, name)
    text = str(caught.value).replace(f"{name}: no such", "no such").replace(f"{name} ", "", 1)
    assert text == f"{KEY}: {message.format(here=here)}"


def test_a_name_that_was_downloaded_is_no_slip(here):
    (here / "hub" / "models--bsae").mkdir(parents=True)
    assert model_folder(KEY, "bsae") == "bsae"
    with pytest.raises(ValueError, match="hf download --repo-type dataset bsae"):
        check_there("data.dataset_name", "bsae", "dataset")


def config(**sections: Any) -> Config:
    tree: dict[str, Any] = {
        "output_dir": "runs/x",
        "model": {"model_name_or_path": "base"},
        "data": {"dataset_name": "data"},
        "objective": {"loss_type": "dpo"},
    }
    return Config.model_validate(tree | sections)


def test_every_model_of_a_config_is_found():
    names = ("model_name_or_path", "ref_model_name_or_path", "tokenizer_name_or_path")
    peft = {"base_model_name_or_path": "runs/sft"}
    found = located(config(model=dict.fromkeys(names, "runs/sft"), peft=peft))
    assert {getattr(found.model, name) for name in names} == {"runs/sft/model"}
    assert found.peft is not None and found.peft.base_model_name_or_path == "runs/sft/model"
    assert located(config()) == config()


@pytest.mark.parametrize(
    "sections, message",
    [
        (
            {"model": {"model_name_or_path": "base", "ref_model_name_or_path": "./x"}},
            r"^model\.ref_model_name",
        ),
        (
            {"model": {"model_name_or_path": "base", "tokenizer_name_or_path": "./x"}},
            r"^model\.tokenizer_name",
        ),
        (
            {"data": {"dataset_name": "data/tset.jsonl"}},
            r"^data\.dataset_name: data/tset.jsonl: no such file",
        ),
        (
            {"data": {"datasets": [{"path": "data"}, {"path": "./dta"}]}},
            r"^data\.datasets\.1\.path: .*mean data\?",
        ),
    ],
)
def test_the_key_that_names_it_is_said(sections, message):
    with pytest.raises(ValueError, match=message):
        located(config(**sections))
