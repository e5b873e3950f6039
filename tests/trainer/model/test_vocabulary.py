"""Tokenizers that are larger than their model, smaller, and without a pad token."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import LLAMA, make_config, run_ranks, save_model, without_clock, write_pairs
from peft import LoraConfig, get_peft_model
from small_runs import cut_back, with_sections
from transformers import AutoModelForCausalLM, AutoTokenizer

from madpo.trainer.config.model import ModelConfig
from madpo.trainer.config.schema import Config
from madpo.trainer.data.training_data import load_data
from madpo.trainer.errors import UserError
from madpo.trainer.model.build import known_tokens, load_sampler
from madpo.trainer.model.pretrained import build_from_scratch
from madpo.trainer.model.tokenizer import load_tokenizer, padding_token
from madpo.trainer.stages.generate import run_generation
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


MISSING = (
    rf"train\.jsonl:3: token {TOKENS} \('<new>'\) has no row in the model's embedding, which has {TOKENS}"
)


def with_new_token(config: Config, in_row: int | None) -> Config:
    """The run with a tokenizer of one token more than the model knows, and rows of which one may have it."""
    tokenizer = AutoTokenizer.from_pretrained(str(config.model.model_name_or_path))
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(str(config.model.model_name_or_path))
    file = Path(str(config.data.dataset_name)) / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    if in_row is not None:
        rows[in_row - 1]["rejected"] += " <new>"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config


def test_a_token_of_the_data_without_a_row_is_refused(tmp_path, tokenizer_folder):
    """Before a model is loaded; in a stream when the block with the row is read."""
    config = with_new_token(config_of(tmp_path, tokenizer_folder, resize=False, vocab_size=TOKENS), in_row=3)
    with pytest.raises(UserError, match=MISSING + r"; set model\.resize_embeddings=true if"):
        run_training(config, "madpo train test.yaml")
    with pytest.raises(UserError, match=MISSING):
        run_training(with_sections(config, {"loss_type": "kto"}, data={"merge_prompts": True}), "")
    streamed = updated(config, {"data": {"streaming": True, "stream_block": 2, "order": "as_is"}})
    tokenizer = load_tokenizer(config.model)
    source = load_data(streamed, tokenizer, True, known_tokens(streamed, tokenizer)).source
    assert source is not None and len(source.take(0, 2)[1]) == 2
    with pytest.raises(UserError, match=MISSING):
        source.take(2, 1)
    generating = updated(config, {"data": {"dataset_test_split": None}})
    with pytest.raises(UserError, match=r"train\.jsonl:1: .* token \d+ \('.+'\) has no row"):
        run_generation(updated(generating, {"model": {"model_name_or_path": str(small(tmp_path, config))}}))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_with_a_token_without_an_embedding_is_a_bad_row(streaming, tmp_path, tokenizer_folder):
    """Dropped, counted and named where bad rows are; the tokens in the cache are those of any model."""
    config = with_new_token(config_of(tmp_path, tokenizer_folder, resize=False, vocab_size=TOKENS), in_row=3)
    config = updated(config, {"data": {"on_bad_row": "drop", "streaming": streaming}})
    tokenizer = load_tokenizer(config.model)
    all_known, dropped = (
        load_data(config, tokenizer, True, known).report["train"] for known in (TOKENS + 1, TOKENS)
    )
    assert dropped["groups"] == all_known["groups"] - 1 and not all_known["dropped"]
    assert dropped["dropped"] == {"unreadable": 1}
    assert re.search(MISSING, dropped["where"]["unreadable"][0])


def small(folder: Path, config: Config) -> Path:
    """A model that lacks most tokens of the tokenizer beside it."""
    return save_model(folder / "small", Path(str(config.model.model_name_or_path)), seed=1, vocab_size=20)


def test_the_smaller_of_policy_and_reference_counts(tmp_path, tokenizer_folder):
    config = with_new_token(config_of(tmp_path, tokenizer_folder, resize=False, vocab_size=TOKENS), None)
    tokenizer = load_tokenizer(config.model)
    assert known_tokens(config, tokenizer) == TOKENS
    other = {"ref_model_name_or_path": str(small(tmp_path, config)), "reference": "cached"}
    assert known_tokens(updated(config, {"model": other}), tokenizer) == 20
    assert known_tokens(updated(config, {"model": {"resize_embeddings": True}}), tokenizer) == TOKENS + 1


@pytest.mark.parametrize("adapter", [None, {"lora_r": 2}], ids=["whole", "adapter"])
def test_a_larger_tokenizer_whose_tokens_do_not_occur_is_a_remark(adapter, tmp_path, tokenizer_folder, capfd):
    """As Gemma 3's, whose text models lack an image's token: the export has the shapes of the start."""
    config = with_new_token(config_of(tmp_path, tokenizer_folder, resize=False, vocab_size=TOKENS), None)
    config = Config.model_validate(config.model_dump(by_alias=True) | {"peft": adapter})
    run_ranks(1, train, updated(config, {"train": {"export_merged": adapter is not None}}))
    assert capfd.readouterr().out.count(f"{TOKENS + 1} tokens and the model's embedding {TOKENS} rows") == 1
    folder = Path(config.output_dir) / ("merged" if adapter else "model")
    exported: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert exported.get_input_embeddings().weight.shape[0] == exported.config.vocab_size == TOKENS
    assert len(AutoTokenizer.from_pretrained(folder)) == TOKENS + 1


def test_an_adapter_with_resized_embeddings_loads(tmp_path, tokenizer_folder):
    """What peft stores of them: copies in `modules_to_save`, and the embeddings once more. Beside an adapter
    that trains no copy they are a part of the base, which an adapter's export would lose."""
    base = save_model(tmp_path / "base", tokenizer_folder, seed=1, vocab_size=TOKENS)
    ids = torch.arange(TOKENS - 4, TOKENS + 2)[None]
    for name, whole in (("copies", ["embed_tokens", "lm_head"]), ("beside", None)):
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(TOKENS + 2)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=whole))
        with torch.no_grad():
            want = model(input_ids=ids).logits
        folder = tmp_path / name
        model.save_pretrained(folder)
        config = make_config(
            tmp_path, {"model": {"model_name_or_path": str(folder)}, "data": {"dataset_name": "none"}}
        )
        if name == "copies":
            loaded: Any = load_sampler(updated(config, {"train": {"bf16": False}}), str(folder), None)
            torch.testing.assert_close(loaded(input_ids=ids).logits, want)
            assert known_tokens(config, AutoTokenizer.from_pretrained(tokenizer_folder)) == TOKENS + 2
        else:
            with pytest.raises(UserError, match=rf"of {TOKENS + 2} rows, a part of its base .*merge_and_un"):
                load_sampler(config, str(folder), None)


def test_a_padding_token_that_the_model_knows(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    made = {key: value for key, value in LLAMA.items() if not key.endswith("token_id")}
    scratch = ModelConfig(init_config={**made, "vocab_size": TOKENS})
    own = padding_token(tokenizer, TOKENS)
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    assert padding_token(tokenizer, TOKENS + 1) == TOKENS
    assert padding_token(tokenizer, TOKENS) < TOKENS and own < TOKENS
    model = build_from_scratch(scratch, tokenizer, torch.float32, "sdpa", AutoModelForCausalLM)
    assert model.config.vocab_size == TOKENS and model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id is None


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
    cut_back(Path(config.output_dir), 1)
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
