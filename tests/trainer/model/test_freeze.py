"""Parts that are not trained: named, left as they were, and without a gradient that nobody reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import make_config, run_ranks, save_model, write_pairs
from kernel_cases import relative_error
from lora_cases import changed, train
from plain import zero3_steps
from safetensors.torch import load_file
from small_runs import cut_off
from transformers import AutoModelForCausalLM

from madpo.kernels import preference_loss as kernels
from madpo.trainer.config.schema import Config
from madpo.trainer.errors import UserError
from madpo.trainer.model.freeze import count_parameters, freeze


@pytest.fixture
def config(tmp_path, tokenizer_folder) -> Config:
    write_pairs(tmp_path / "pairs.jsonl", 21)
    return make_config(
        tmp_path,
        {
            "model": {"model_name_or_path": str(save_model(tmp_path / "base", tokenizer_folder, seed=1))},
            "data": {"dataset_name": str(tmp_path / "pairs.jsonl")},
            "optim": {"lr": 1e-2, "weight_decay": 0.1},
            "train": {"max_steps": 2},
        },
    )


FROZEN = ["embeddings", "head", "model.layers.0.*", "*norm.weight"]


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [2, 3])
def test_frozen_weights_stay_and_the_others_have_the_gradient_that_they_had(config, tmp_path, stage):
    """Weight decay would move them too if the optimiser had them."""
    deepspeed = {"zero_optimization": {"stage": stage}}
    run = changed(config, model={"freeze": FROZEN}, deepspeed=deepspeed)
    got = run_ranks(2, zero3_steps, run, 1)[0]
    want = run_ranks(2, zero3_steps, changed(config, deepspeed=deepspeed), 1)[0]
    assert got[0][0] == want[0][0]
    trained = got[0][1]
    assert len(trained) == 7 and all(name.startswith("model.layers.1.") for name in trained)
    for name, gradient in trained.items():
        assert relative_error(gradient, want[0][1][name]) < 1e-6, name
    run_ranks(2, train, run)
    start, end = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "run/model"))
    for name, value in start.items():
        assert torch.equal(end[name], value) is (name not in trained), name


@pytest.mark.ranks
def test_resume_of_a_partly_frozen_run_is_bitwise(config, tmp_path):
    whole = changed(
        config, output_dir=str(tmp_path / "whole"), model={"freeze": FROZEN}, train={"save_steps": 1}
    )
    run_ranks(2, train, whole)
    cut = cut_off(whole, tmp_path / "cut", 1)
    run_ranks(2, train, cut)
    got, want = (Path(run.output_dir) / "model" / "model.safetensors" for run in (cut, whole))
    assert got.read_bytes() == want.read_bytes()
    with pytest.raises(AssertionError, match=r"model\.freeze: .* there, \[\] now"):
        run_ranks(2, train, changed(cut, model={"freeze": []}))


def head_gradients(shard, config: Config) -> list[tuple[bool, ...]]:
    """Which gradients the loss head formed: of hidden states, weight and bias."""
    seen: list[tuple[bool, ...]] = []
    forward = kernels.preference_loss_fwd

    def watched(*args: Any, **options: Any) -> Any:
        result, gradients = forward(*args, **options)
        seen.append(tuple(gradient is not None for gradient in gradients))
        return result, gradients

    kernels.preference_loss_fwd = watched
    zero3_steps(shard, config, 1)
    return seen


@pytest.mark.ranks
def test_a_frozen_head_has_no_gradient_formed(config):
    """The largest single buffer of a step: (V, H)."""
    assert set(run_ranks(1, head_gradients, config)[0]) == {(True, True, False)}
    frozen = changed(config, model={"freeze": ["head"]})
    assert set(run_ranks(1, head_gradients, frozen)[0]) == {(True, False, False)}
    adapter = changed(config, peft={"lora_r": 4})
    assert set(run_ranks(1, head_gradients, adapter)[0]) == {(True, False, False)}


def model(tied: bool = False) -> Any:
    from harness import LLAMA
    from transformers import AutoConfig

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**LLAMA, "tie_word_embeddings": tied}))


def test_words_and_patterns():
    untied, both = model(), model(tied=True)
    freeze(untied, ["embeddings", "*.layers.1.mlp.*"])
    names = [name for name, p in untied.named_parameters() if not p.requires_grad]
    assert names == [
        "model.embed_tokens.weight",
        *(f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    ]
    trained, total = count_parameters(untied)
    assert total - trained == 311 * 32 + 3 * 64 * 32
    freeze(both, ["head"])  # one weight with two names
    assert not both.model.embed_tokens.weight.requires_grad


def test_a_pattern_that_fits_nothing_is_refused_with_names_that_are_near():
    with pytest.raises(UserError, match=r"model\.freeze: no weight of LlamaForCausalLM fits 'modle\.layer"):
        freeze(model(), ["modle.layers.0.mlp.up_proj"])
    with pytest.raises(UserError, match=r"names like .*model\.layers\.0\.mlp\.up_proj\.weight"):
        freeze(model(), ["model.layers.0.mlp.up_porj.weight"])
    with pytest.raises(UserError, match=r"model\.freeze: it leaves nothing to train"):
        freeze(model(), ["*"])
