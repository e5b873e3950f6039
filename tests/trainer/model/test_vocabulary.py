"""Tokenizers that are larger than their model, smaller, and without a pad token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import LLAMA, make_config, run_ranks, save_model, without_clock, write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from madpo.trainer.config.schema import Config
from madpo.trainer.stages.train import run_training

pytestmark = pytest.mark.ranks
KNOWN, TOKENS = 290, 300
"""Of the model and of its tokenizer."""


def config_of(tmp_path: Path, tokenizer: Path, resize: bool = True, **changes: Any) -> Config:
    model = save_model(tmp_path / "start", tokenizer, seed=1, **changes)
    write_pairs(tmp_path / "pairs" / "train.jsonl", 12)
    write_pairs(tmp_path / "pairs" / "test.jsonl", 8, seed=9)
    return make_config(
        tmp_path,
        {
            "model": {"model_name_or_path": str(model), "resize_embeddings": resize},
            "data": {"dataset_name": str(tmp_path / "pairs"), "dataset_test_split": "test"},
            "optim": {"lr": 1e-9},
            "train": {"max_steps": 1},
        },
    )


def train(shard, config: Config) -> None:
    run_training(config, "madpo train test.yaml")


def records(config: Config) -> list[dict[str, Any]]:
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    "changes",
    [{"tied": False}, {"tied": True}, {"model_type": "phi"}],
    ids=["untied", "tied", "bias"],
)
def test_a_model_gets_the_rows_that_it_lacks(changes, tmp_path, tokenizer_folder):
    """The mean of the others, in policy and reference alike, so that the run starts at a margin of 0; the old
    rows, and the scores of tokens among them up to the new ones' share, are what they were."""
    config = config_of(tmp_path, tokenizer_folder, vocab_size=KNOWN, **changes)
    run_ranks(2, train, config)
    first = records(config)[0]
    assert first["rewards/margins"] == 0.0 and first["kl"] == 0.0
    folder = Path(config.output_dir) / "model"
    start: Any = AutoModelForCausalLM.from_pretrained(str(config.model.model_name_or_path))
    exported: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert exported.config.vocab_size == TOKENS == len(AutoTokenizer.from_pretrained(folder))
    before, after = start.state_dict(), exported.state_dict()
    wider = [name for name in before if before[name].shape != after[name].shape]
    assert set(wider) >= {"model.embed_tokens.weight", "lm_head.weight"}
    assert ("lm_head.bias" in wider) is (changes.get("model_type") == "phi")
    for name in wider:
        rows = before[name].mean(0, keepdim=True).expand(TOKENS - KNOWN, *before[name].shape[1:])
        torch.testing.assert_close(after[name], torch.cat((before[name], rows)), rtol=1e-5, atol=1e-6)
    tied = exported.lm_head.weight is exported.model.embed_tokens.weight
    assert tied is changes.get("tied", False)


def test_without_the_key_the_error_names_it(tmp_path, tokenizer_folder):
    config = config_of(tmp_path, tokenizer_folder, resize=False, vocab_size=KNOWN)
    with pytest.raises(AssertionError, match=r"300 tokens .* only 290: set model\.resize_embeddings=true"):
        run_ranks(2, train, config)


def test_a_resized_run_continues(tmp_path, tokenizer_folder):
    """The checkpoint's rows come back, not new means."""
    config = config_of(tmp_path, tokenizer_folder, vocab_size=KNOWN)
    longer = {
        "optim": {"lr": 1e-3, "lr_scheduler_type": "constant"},
        "train": {"save_steps": 1, "max_steps": 2},
    }
    config = updated(config, longer)
    run_ranks(2, train, config)
    whole = records(config)
    (Path(config.output_dir) / "checkpoints" / "latest").write_text("step-00000001")
    run_ranks(2, train, config)
    assert [without_clock(line) for line in records(config)] == [without_clock(line) for line in whole]


def updated(config: Config, sections: dict[str, Any]) -> Config:
    tree = config.model_dump(by_alias=True)
    return Config.model_validate(tree | {name: tree[name] | values for name, values in sections.items()})


def test_rows_beyond_the_tokenizer_are_left_as_they_are(tmp_path, tokenizer_folder):
    """A vocabulary filled up to 311: no text has the tokens, whose embeddings stay where they were."""
    config = updated(config_of(tmp_path, tokenizer_folder), {"optim": {"lr": 1e-3}})
    run_ranks(2, train, config)
    start: Any = AutoModelForCausalLM.from_pretrained(str(config.model.model_name_or_path))
    exported: Any = AutoModelForCausalLM.from_pretrained(Path(config.output_dir) / "model")
    before, after = start.model.embed_tokens.weight, exported.model.embed_tokens.weight
    assert exported.config.vocab_size == LLAMA["vocab_size"] > TOKENS
    assert torch.equal(after[TOKENS:], before[TOKENS:])
    assert not torch.equal(after[:TOKENS], before[:TOKENS])


def test_a_tokenizer_without_a_pad_token_is_as_good_as_one_with(tmp_path, tokenizer_folder):
    """Nothing is padded: the same numbers, and an export that loads and still has none."""
    lines = []
    for name in ("with", "without"):
        folder = tmp_path / name
        config = config_of(folder, tokenizer_folder, pad_token_id=None if name == "without" else 0)
        model = Path(str(config.model.model_name_or_path))
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.pad_token = None if name == "without" else tokenizer.eos_token
        tokenizer.save_pretrained(model)
        run_ranks(2, train, config)
        lines.append({k: v for k, v in without_clock(records(config)[-1]).items() if k.startswith("eval")})
        exported = AutoTokenizer.from_pretrained(Path(config.output_dir) / "model")
        assert (exported.pad_token is None) is (name == "without")
        AutoModelForCausalLM.from_pretrained(Path(config.output_dir) / "model")
    assert lines[0] == lines[1]


def test_an_adapter_does_not_widen_its_base(tmp_path, tokenizer_folder):
    config = config_of(tmp_path, tokenizer_folder, vocab_size=KNOWN)
    config = Config.model_validate(config.model_dump(by_alias=True) | {"peft": {"lora_r": 2}})
    with pytest.raises(AssertionError, match=r"resize_embeddings: an adapter is put on its base model"):
        run_ranks(1, train, config)
