"""Sampling: the right distribution, padding and end, and nothing of the model's own settings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from harness import make_config, run_ranks, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from madpo.trainer.config.schema import Config
from madpo.trainer.sampling.samplers import completion_of, open_sampler

OWN_SETTINGS = {
    "do_sample": True,
    "top_k": 3,
    "top_p": 0.5,
    "temperature": 0.2,
    "repetition_penalty": 4.0,
    "no_repeat_ngram_size": 1,
    "max_length": 9,
    "forced_eos_token_id": 5,
    "suppress_tokens": [10, 11, 12],
    "eos_token_id": [2, 7],
}


@pytest.fixture
def folder(tmp_path, tokenizer_folder) -> Path:
    """A model with generation settings of its own."""
    folder = save_model(tmp_path / "model", tokenizer_folder, seed=1)
    (folder / "generation_config.json").write_text(json.dumps(OWN_SETTINGS))
    return folder


def config_of(folder: Path, **generate: Any) -> Config:
    tree = {"model": {"model_name_or_path": str(folder)}, "data": {"dataset_name": "none"}}
    return make_config(folder.parent, {**tree, "generate": generate})


def sampler_of(folder: Path, **generate: Any) -> Any:
    return open_sampler(
        config_of(folder, **generate), str(folder), None, AutoTokenizer.from_pretrained(folder)
    )


def logits_after(folder: Path, ids: list[int]) -> torch.Tensor:
    """(V,) by plain transformers, alone, without a cache."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """How many standard deviations Pearson's statistic lies above its mean; rare tokens are one bin."""
    draws = float(counts.sum())
    order = probabilities.argsort(descending=True)
    counts, expected = counts[order].double(), probabilities[order] * draws
    common = int((expected >= 5).sum())
    counts = torch.cat([counts[:common], counts[common:].sum()[None]])
    expected = torch.cat([expected[:common], expected[common:].sum()[None]])
    bins = expected > 0
    statistic = float(((counts - expected).square() / expected)[bins].sum())
    freedom = int(bins.sum()) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_are_drawn_from_the_softmax(folder, temperature):
    """The first and, behind the likeliest first, the second token; in a batch with a longer prompt."""
    prompt, longer, draws = [1, 40, 50, 60], [1, *range(30, 45)], 20_000
    sampler = sampler_of(folder, num_completions=draws, max_new_tokens=2, temperature=temperature)
    rows = sampler([prompt, longer], seed=3)[0]
    first = torch.bincount(torch.tensor([row[0] for row in rows]), minlength=311)
    expected = (logits_after(folder, prompt) / temperature).softmax(0)
    assert chi_square(first, expected) < 4
    likeliest = int(first.argmax())
    assert likeliest not in sampler.ends
    second = torch.bincount(torch.tensor([row[1] for row in rows if row[0] == likeliest]), minlength=311)
    assert second.sum() > 500
    expected = (logits_after(folder, [*prompt, likeliest]) / temperature).softmax(0)
    assert chi_square(second, expected) < 4
    wrong = (logits_after(folder, prompt) / (temperature * 1.3)).softmax(0)
    assert chi_square(first, wrong) > 10


@pytest.mark.parametrize("options", [{"top_k": 4}, {"top_p": 0.3}])
def test_the_configs_own_cuts_are_made(folder, options):
    prompt = [1, 40, 50, 60]
    rows = sampler_of(folder, num_completions=4000, max_new_tokens=1, **options)([prompt], seed=3)[0]
    probabilities, order = logits_after(folder, prompt).softmax(0).sort(descending=True)
    kept = options.get("top_k") or int((probabilities.cumsum(0) < options["top_p"]).sum()) + 1
    assert {row[0] for row in rows} == set(order[:kept].tolist())


def test_a_batch_is_what_its_prompts_are_alone(folder):
    """Greedy, against argmax after argmax without cache or padding."""
    prompts = [[1, *range(30, 30 + n)] for n in (1, 4, 11, 17)]
    together = sampler_of(folder, num_completions=1, max_new_tokens=12, temperature=0)(prompts, seed=0)
    for prompt, (row,) in zip(prompts, together, strict=True):
        want: list[int] = []
        while len(want) < 12 and want[-1:] not in ([2], [7]):
            want.append(int(logits_after(folder, prompt + want).argmax()))
        assert row == want


def test_a_completion_ends_with_each_token_that_the_folder_names(folder):
    sampler = sampler_of(folder, num_completions=600, max_new_tokens=30)
    rows = sampler([[1, 40, 41]], seed=1)[0]
    assert sampler.ends == {2, 7}
    assert {row[-1] for row in rows if len(row) < 30} == {2, 7}
    assert not any(token in (2, 7) for row in rows for token in row[:-1])


def test_the_seed_decides(folder):
    sampler = sampler_of(folder, num_completions=3, max_new_tokens=8)
    one, again, other = (sampler([[1, 40, 41]], seed=seed) for seed in (1, 1, 2))
    assert one == again != other


def test_too_long_a_prompt_is_refused(folder):
    sampler = sampler_of(folder, max_new_tokens=200)
    with pytest.raises(
        ValueError, match=r"prompt of 57 tokens .* 256 positions .* data.max_length to at most 57"
    ):
        sampler([[1] * 57], seed=0)
    assert len(sampler([[1] * 56], seed=0)[0]) == 2


def test_a_padding_token_that_the_model_lacks_is_not_used(folder):
    """Prompts with such a token are refused before a model is loaded."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new {number}>" for number in range(20)])
    tokenizer.add_special_tokens({"pad_token": "<pad 320>"})
    sampler = open_sampler(config_of(folder, max_new_tokens=2), str(folder), None, tokenizer)
    assert len(sampler([[1, 40], [1]], seed=0)) == 2


def test_vllm_that_is_not_there(folder, monkeypatch):
    monkeypatch.setattr("madpo.trainer.sampling.samplers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"vllm is not installed; .*pip install .*vllm, or set backend=hf"):
        sampler_of(folder, backend="vllm")
    assert sampler_of(folder, backend="auto", num_completions=1, max_new_tokens=2)([[1, 40]], seed=0)


def test_text_is_read_off_behind_the_prompt(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    prompt = tokenizer("the film")["input_ids"]
    for text in (" was good", "s , bad .", " 'tis é€"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        stopped = completion_of(prompt, [*ids, 2], frozenset([2]), tokenizer)
        assert (stopped.text, stopped.finish, stopped.tokens) == (text, "stop", len(ids) + 1)
    cut = completion_of(prompt, ids[:-1], frozenset([2]), tokenizer)  # within the euro sign
    assert (cut.text, cut.finish) == (" 'tis é", "length")


def test_the_space_before_the_first_word_is_kept():
    """Sentencepiece's way: a decoder that drops the space at a text's beginning."""
    words = {"<s>": 0, "</s>": 1, "▁the": 2, "▁film": 3, "▁was": 4, "s": 5}
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert tokenizer.decode([4]) == "was"
    assert completion_of([0, 2, 3], [4, 1], frozenset([1]), tokenizer).text == " was"
    assert completion_of([0, 2, 3], [5, 4], frozenset([1]), tokenizer).text == "s was"


@pytest.mark.ranks
def test_a_partitioned_model_samples_the_same(folder):
    prompts = [[1, *range(30, 30 + n)] for n in (2, 7, 5)]
    whole = sampler_of(folder, max_new_tokens=9)
    want = [whole(prompts, seed=seed) for seed in (0, 1)]
    found = run_ranks(2, sample_partitioned, folder, prompts)
    assert found == want


def sample_partitioned(shard, folder: Path, prompts: list[list[int]]) -> Any:
    """Another batch on each rank, of completions that end at other steps."""
    sampler = sampler_of(folder, max_new_tokens=9, partitioned=True)
    assert all(parameter.numel() == 0 for parameter in sampler.model.parameters())
    rows = sampler(prompts, seed=shard.rank)
    sampler.close()
    return rows


@pytest.mark.parametrize("family", ["Gemma 2", "gpt-oss"])
def test_families_that_sdpa_cannot_serve_are_sampled_from(family, tmp_path, tokenizer_folder):
    """Soft-caps and sinks: transformers chooses the attention."""
    tiny_model(family, "eager", vocab_size=311).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path / "model")
    sampler = sampler_of(tmp_path / "model", num_completions=1, max_new_tokens=1, temperature=0.0)
    (((token, *_),),) = sampler([[5, 6, 7]], 0)
    assert token == logits_after(tmp_path / "model", [5, 6, 7]).argmax()
