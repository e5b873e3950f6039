"""Folders that hold another thing than what is asked of them."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from harness import save_classifier, save_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from madpo.trainer.config.model import ModelConfig
from madpo.trainer.errors import UserError
from madpo.trainer.model.pretrained import load_pretrained
from madpo.trainer.model.tokenizer import load_tokenizer


def refusal(folder: Path) -> str:
    """What a policy from the folder is refused with."""
    with pytest.raises(UserError) as caught:
        load_pretrained(str(folder), None, torch.float32, "eager", AutoModelForCausalLM, None)
    return str(caught.value)


def test_a_reward_model_is_no_policy(tmp_path, tokenizer_folder):
    folder = save_classifier(tmp_path / "reward", tokenizer_folder)
    assert refusal(folder) == (
        f"model {str(folder)!r} is a reward model (LlamaForSequenceClassification), which writes no text; "
        "name a causal language model"
    )


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("BertForMaskedLM", "a masked language model (BertForMaskedLM), whose tokens see those behind them"),
        (
            "T5ForConditionalGeneration",
            "an encoder-decoder model (T5ForConditionalGeneration), whose prompts have layers of their own",
        ),
    ],
)
def test_a_model_that_does_not_write_token_by_token_is_no_policy(tmp_path, family, kind):
    config = getattr(transformers, family).config_class(architectures=[family])
    config.save_pretrained(tmp_path)  # refused before its weights are looked for
    assert refusal(tmp_path) == f"model {str(tmp_path)!r} is {kind}; name a causal language model"


def test_families_that_could_be_loaded_are_not_listed(tmp_path):
    transformers.CLIPConfig(architectures=["CLIPModel"]).save_pretrained(tmp_path)
    text = refusal(tmp_path)
    assert "CLIPConfig" in text and "LlamaConfig" not in text and len(text) < 400


@pytest.mark.parametrize("key", ["model_name_or_path", "tokenizer_name_or_path"])
def test_a_folder_without_a_tokenizer_says_so(tmp_path, tokenizer_folder, key):
    folder = save_model(tmp_path / "model", tokenizer_folder, seed=1)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, bare)
    with pytest.raises(ValueError) as caught:
        load_tokenizer(ModelConfig.model_validate({key: str(bare)}))
    assert str(caught.value) == (
        f"model.{key}: {bare} holds no tokenizer; set model.tokenizer_name_or_path to the model that it was "
        "made of"
    )
    named = ModelConfig(model_name_or_path=str(bare), tokenizer_name_or_path=str(folder))
    assert load_tokenizer(named).eos_token_id == 2


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, tokenizer_folder) -> Path:
    """A model in several files with an index; not to be written into."""
    folder = save_model(tmp_path_factory.mktemp("sharded") / "model", tokenizer_folder, seed=1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def load_folder(folder: Path | str):
    return load_pretrained(str(folder), None, torch.float32, "eager", AutoModelForCausalLM, None).model


def with_shard_at(folder: Path, copy: Path, place: str) -> Path:
    """A copy of the model whose index has its first file at another place."""
    shutil.copytree(folder, copy)
    file = copy / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    first = min(index["weight_map"].values())
    target = copy / place
    (copy / "part").mkdir()
    (copy / first).rename(target)
    weights = {name: place if own == first else own for name, own in index["weight_map"].items()}
    file.write_text(json.dumps({**index, "weight_map": weights}))
    return copy


@pytest.mark.parametrize("place", ["../outside.safetensors", "part/../../outside.safetensors", "{}/outside"])
def test_an_index_that_names_a_file_outside_is_refused(sharded, tmp_path, place):
    place = place.format(tmp_path)
    copy = with_shard_at(sharded, tmp_path / "copy", place)
    with pytest.raises(ValueError) as caught:
        load_folder(copy)
    assert str(caught.value) == (
        f"model {str(copy)!r}: its model.safetensors.index.json names {place!r}, which is outside its folder"
    )


@pytest.mark.parametrize("text", ["[]", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', "{"])
def test_an_index_that_is_none_is_refused(sharded, tmp_path, text):
    copy = shutil.copytree(sharded, tmp_path / "copy")
    (copy / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"model.safetensors.index.json"):
        load_folder(copy)


def test_files_of_a_subfolder_and_links_of_the_cache_are_inside(sharded, tmp_path):
    """The hub's cache holds links to files in another folder."""
    whole = load_folder(sharded).state_dict()
    deeper = with_shard_at(sharded, tmp_path / "deeper", "part/first.safetensors")
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sharded.iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    for folder in (deeper, snapshot):
        same = load_folder(folder).state_dict()
        assert all(torch.equal(same[name], weight) for name, weight in whole.items())


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_a_pickle_of_weights_is_read_and_one_that_holds_more_is_refused(tmp_path, tokenizer_folder):
    folder, mark = save_model(tmp_path / "model", tokenizer_folder, seed=1), tmp_path / "was_run"
    weights, path = load_file(folder / "model.safetensors"), folder / "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    torch.save(weights, path)
    load_pretrained(str(folder), None, torch.float32, "eager", AutoModelForCausalLM, None)
    torch.save(weights | {"more": Payload(mark)}, path)
    says = r"its weights \(pytorch_model\*\.bin\) are a pickle .* take a model of safetensors, or convert"
    assert re.search(says, text := refusal(folder)) and len(text.splitlines()) == 1
    path.write_bytes(pickle.dumps({"more": Payload(mark)}))
    assert re.search(says, refusal(folder)) and not mark.exists()
    path.write_bytes(b"")
    refusal(folder)
