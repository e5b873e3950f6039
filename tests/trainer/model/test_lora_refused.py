"""What cannot be combined with an adapter, and adapters that cannot be used: each with what to do."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import LLAMA, make_config, run_ranks, save_model, write_pairs
from lora_cases import STAGE_2, changed, stored_adapter, train
from transformers import AutoModelForCausalLM

from madpo.trainer.config.schema import Config, load
from madpo.trainer.errors import UserError
from madpo.trainer.model import lora
from madpo.trainer.model.build import load_sampler
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.stages.start_engine import start_engine


@pytest.fixture
def config(tmp_path, tokenizer_folder) -> Config:
    return make_config(
        tmp_path,
        {
            "model": {"model_name_or_path": str(save_model(tmp_path / "base", tokenizer_folder, seed=1))},
            "data": {"dataset_name": str(write_pairs(tmp_path / "pairs.jsonl", 12))},
            "train": {"max_steps": 1, "export": False},
            "peft": {"lora_r": 4},
        },
    )


BY_CONFIG = [
    ({"peft": {"lora_dropout": 0.05}}, r"lora_dropout: 0\.05 would be noise in the margin"),
    ({"peft": {"load_in_4bit": True, "load_in_8bit": True}}, "load_in_4bit, load_in_8bit: set one of them"),
    ({"peft": {"load_in_4bit": True}}, r"they compute in bf16; set train\.bf16=true"),
    (
        {"peft": {"load_in_4bit": True}, "train": {"bf16": True}},
        r"ZeRO-3 gathers .*zero_optimization\.stage=2",
    ),
    ({"peft": {"use_dora": True}}, r"peft\.use_dora: .*zero_optimization\.stage=2"),
    ({"model": {"sync_ref_model": True}}, r"model\.sync_ref_model: the reference of an adapter"),
    ({"model": {"freeze": ["head"]}}, r"model\.freeze: with peft nothing but the adapter"),
    (
        {
            "peft": {"load_in_4bit": True},
            "train": {"bf16": True, "export_merged": True},
            "deepspeed": STAGE_2,
        },
        r"train\.export_merged: the base is quantised",
    ),
    (
        {
            "model": {"model_name_or_path": None, "init_config": LLAMA, "tokenizer_name_or_path": "t"},
            "objective": {"loss_type": "nll"},
        },
        r"peft: an adapter needs weights that it can be put on again",
    ),
]


@pytest.mark.parametrize("sections, message", BY_CONFIG, ids=[message for _, message in BY_CONFIG])
def test_refused_by_the_config(config, sections, message):
    with pytest.raises(ValueError, match=message):
        changed(config, **sections)


def test_keys_of_the_section_are_checked_like_others(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "output_dir: x\nmodel: {model_name_or_path: m}\ndata: {dataset_name: d}\n"
        "objective: {loss_type: dpo}\n"
    )
    settings = load(path, ["peft.lora_r=8"]).peft
    assert settings is not None and settings.lora_r == 8
    assert load(path).peft is None
    with pytest.raises(UserError, match=r"peft\.lora_rank: unknown key; it is peft\.lora_r here"):
        load(path, ["peft.lora_rank=8"])
    with pytest.raises(UserError, match=r"train\.max_shard_size: .*as in 5GB.* got '5 gigabytes'"):
        load(path, ["train.max_shard_size=5 gigabytes"])


BY_MODEL = [
    (
        {"lora_target_modules": ["q_porj"]},
        r"lora_target_modules: .* 'q_porj', did you mean 'q_proj'",
    ),
    ({"lora_target_modules": ["q_proj", "lm_head"]}, r"lm_head is Linear; .*lora_modules_to_save"),
    ({"lora_target_modules": ["embed_tokens"]}, r"embed_tokens is Embedding; .*lora_modules_to_save"),
    ({"lora_modules_to_save": ["lm_haed"]}, r"lora_modules_to_save: .* no module 'lm_haed', did you mean"),
]


@pytest.mark.ranks
@pytest.mark.parametrize("settings, message", BY_MODEL, ids=[message for _, message in BY_MODEL])
def test_refused_by_the_model(config, settings, message):
    with pytest.raises(AssertionError, match=message):
        run_ranks(2, train, changed(config, peft=settings), checks=True)


@pytest.mark.ranks
def test_copies_of_tied_weights_are_refused(config, tmp_path, tokenizer_folder):
    tied = save_model(tmp_path / "tied", tokenizer_folder, seed=1, tied=True)
    run = changed(
        config, model={"model_name_or_path": str(tied)}, peft={"lora_modules_to_save": ["embed_tokens"]}
    )
    with pytest.raises(AssertionError, match=r"embed_tokens of LlamaForCausalLM is tied to the other end"):
        run_ranks(1, train, run, checks=True)
    run_ranks(1, train, changed(run, peft={"lora_modules_to_save": None}), checks=True)


@pytest.fixture
def adapter(config, tmp_path, tokenizer_folder) -> Path:
    return stored_adapter(tmp_path / "adapter", tmp_path / "base", tokenizer_folder)


def described(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def run_of(config: Config, adapter: Path, **settings: Any) -> Config:
    tree = changed(config, model={"model_name_or_path": str(adapter)}, peft=None)
    return changed(tree, peft=settings) if settings else tree


@pytest.mark.ranks
def test_a_base_model_that_has_moved(config, adapter, tmp_path):
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(AssertionError, match=r"no such folder.*set peft\.base_model_name_or_path"):
        run_ranks(1, train, run_of(config, adapter), checks=True)
    moved = run_of(config, adapter, base_model_name_or_path=str(tmp_path / "moved"))
    run_ranks(1, train, moved, checks=True)
    shutil.move(tmp_path / "moved", tmp_path / "base")
    with pytest.raises(AssertionError, match=r"peft: true there, false now"):
        run_ranks(1, train, run_of(config, adapter), checks=True)
    described(adapter, base_model_name_or_path=None)
    with pytest.raises(AssertionError, match=r"names no base model; set peft\.base_model_name_or_path"):
        run_ranks(1, train, run_of(config, adapter), checks=True)


@pytest.mark.ranks
def test_the_base_in_the_section_is_that_of_the_model_alone(config, adapter, tmp_path, tokenizer_folder):
    """A reference that is an adapter on another base keeps it; samplers too."""
    other = save_model(tmp_path / "other", tokenizer_folder, seed=77)
    theirs = stored_adapter(tmp_path / "their-adapter", other, tokenizer_folder)
    run = run_of(config, adapter, base_model_name_or_path=str(tmp_path / "base"))
    run = changed(run, model={"ref_model_name_or_path": str(theirs)})
    ours, reference = run_ranks(1, first_embeddings, run, checks=True)[0]
    assert torch.equal(ours, embedding(tmp_path / "base"))
    assert torch.equal(reference, embedding(other))
    for name, base in ((adapter, tmp_path / "base"), (theirs, other)):
        sampler: Any = load_sampler(run, str(name), None)
        assert torch.equal(sampler.get_input_embeddings().weight, embedding(base))


def embedding(folder: Path) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    return model.get_input_embeddings().weight.detach()


def first_embeddings(shard, config: Config) -> list[torch.Tensor]:
    import deepspeed

    engine: Any = start_engine(config, load_tokenizer(config.model), training=True)
    out = []
    for model in (engine.module.policy, engine.module.reference):
        weight = model.get_input_embeddings().weight
        with deepspeed.zero.GatheredParameters([weight]):
            out.append(weight.detach().clone())
    engine.release()
    return out


@pytest.mark.ranks
def test_a_base_for_a_model_that_is_no_adapter(config, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    run = changed(config, peft={"base_model_name_or_path": str(tmp_path / "elsewhere")})
    message = r"peft\.base_model_name_or_path: '.*elsewhere' is for a stored adapter, but .* is a whole model"
    with pytest.raises(AssertionError, match=message):
        run_ranks(1, train, run, checks=True)
    with pytest.raises(UserError, match=message):
        load_sampler(run, str(tmp_path / "base"), None)


def test_a_config_that_contradicts_the_stored_adapter(config, adapter):
    found = lora.stored_adapter(str(adapter), None)
    assert found is not None
    for settings, message in (
        ({"lora_r": 8}, r"peft\.lora_r: 8, but the adapter .* has 4; leave the key out"),
        ({"lora_target_modules": ["q_proj"]}, r"peft\.lora_target_modules: \['q_proj'\], but"),
        ({"use_rslora": True}, r"peft\.use_rslora: True, but the adapter .* has False"),
    ):
        run = run_of(config, adapter, **settings)
        assert run.peft is not None
        with pytest.raises(UserError, match=message):
            lora.check_adapter_settings(found, run.peft)
    same = run_of(config, adapter, lora_r=4, lora_alpha=8, load_in_8bit=False).peft
    assert same is not None
    lora.check_adapter_settings(found, same)


@pytest.mark.ranks
def test_what_a_stored_adapter_cannot_do(config, adapter):
    """The section `peft` is absent: the folder alone makes it a run with an adapter."""
    run = run_of(config, adapter)
    with pytest.raises(AssertionError, match=r"model\.sync_ref_model: the reference of an adapter"):
        run_ranks(1, train, changed(run, model={"sync_ref_model": True}), checks=True)
    described(adapter, use_dora=True)
    with pytest.raises(AssertionError, match=r"peft\.use_dora: .*zero_optimization\.stage=2"):
        run_ranks(1, train, run, checks=True)


@pytest.mark.ranks
def test_adapter_folders_that_do_not_fit(config, adapter, tmp_path):
    described(adapter, r=8)
    with pytest.raises(AssertionError, match=r"the adapter does not fit its base model: .*size mismatch"):
        run_ranks(1, train, run_of(config, adapter), checks=True)
    described(adapter, r=4, target_modules=["q_proj"])
    with pytest.raises(AssertionError, match=r"0 weights missing, 24 have no place"):
        run_ranks(1, train, run_of(config, adapter), checks=True)
    described(adapter, bias="all")
    with pytest.raises(UserError, match="a LoRA adapter without trained biases is needed"):
        lora.stored_adapter(str(adapter), None)
    described(adapter, bias="none", peft_type="IA3")
    with pytest.raises(UserError, match="a LoRA adapter"):
        lora.stored_adapter(str(adapter), None)


def test_pickled_weights_are_not_read(config, adapter):
    torch.save({}, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    found = lora.stored_adapter(str(adapter), None)
    assert found is not None
    with pytest.raises(UserError, match=r"there is no adapter_model\.safetensors; save the adapter"):
        _ = found.weights


def test_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'madpo\[peft\]'"):
        lora.require_peft()
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'madpo\[qlora\]'"):
        lora.quantisation(lora.PeftConfig(load_in_4bit=True))


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_quantised_base_under_zero_2(config, tmp_path, tokenizer_folder, bits):
    """A real run: the margin starts at 0, the adapter learns, and the folder loads on the quantised base."""
    wide = save_model(tmp_path / "wide", tokenizer_folder, seed=1, hidden_size=128, intermediate_size=256)
    run = changed(
        config,
        model={"model_name_or_path": str(wide)},
        peft={bits: True},
        optim={"lr": 1e-2},
        train={"bf16": True, "max_steps": 4, "export": True},
        deepspeed=STAGE_2,
    )
    run_ranks(2, train, run, checks=True)
    lines = (Path(run.output_dir) / "metrics.jsonl").read_text().splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    assert first["rewards/margins"] == 0.0 and last["rewards/margins"] > 0.1
    assert (Path(run.output_dir) / "model" / "adapter_model.safetensors").is_file()
    following = changed(
        run_of(run, Path(run.output_dir) / "model", **{bits: True}),
        output_dir=str(tmp_path / "next"),
        train={"max_steps": 1},
    )
    run_ranks(2, train, following, checks=True)
