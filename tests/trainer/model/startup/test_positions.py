"""Sequences that are longer than the positions a model was made for."""

from __future__ import annotations

import json

import pytest
import torch
from harness import LLAMA, make_config
from transformers import AutoConfig, AutoModelForCausalLM

from madpo.trainer.data.tokenised_cache import load_groups
from madpo.trainer.model.attention import prefix_sharing
from madpo.trainer.model.pretrained import without_dropout
from madpo.trainer.model.startup.attention import choose_attention, recorded_inputs
from madpo.trainer.model.startup.checks import check_head, check_noise
from madpo.trainer.model.startup.positions import check_max_length, check_positions, within_positions

CPU = torch.device("cpu")
SIZES = {"vocab_size": 311, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
LEARNED = {
    "gpt2": {"model_type": "gpt2", "n_positions": 16},
    "opt": {"model_type": "opt", "max_position_embeddings": 16, "word_embed_proj_dim": 16, "ffn_dim": 16},
}
MPT = {"model_type": "mpt", "max_seq_len": 16, "d_model": 16, "n_heads": 2, "n_layers": 1}
LIMITED = {**LEARNED, "mpt": MPT}


@pytest.fixture
def groups(tmp_path, tokenizer):
    """One pair whose completions fit into 16 positions, each alone; and one with a longer completion."""
    rows = [{"prompt": "a b c", "chosen": " d e f", "rejected": " g h i"}]
    rows.append({"prompt": "a b c", "chosen": " d" * 20, "rejected": " e"})
    sets = []
    for number in (1, 2):
        file = tmp_path / f"{number}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[:number]))
        tree = {"model": {"model_name_or_path": "m"}, "data": {"dataset_name": str(file)}}
        sets.append(load_groups(make_config(tmp_path, tree).data, "train", tokenizer)[0])
    return sets


def model_of(settings):
    config = without_dropout(AutoConfig.for_model(**{**SIZES, **settings}))
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", LEARNED)
def test_the_checks_at_the_start_stay_within_the_positions(family):
    prefix_sharing.register()
    model = model_of(LEARNED[family])
    model.set_attn_implementation(prefix_sharing.NAMES["sdpa"])
    choose_attention(model, "auto", CPU)
    check_head(model, CPU)
    check_noise(model, CPU)
    assert len(recorded_inputs(model, CPU)) == 1
    assert within_positions(model, 128) == 16 and within_positions(model, 9) == 9


def test_a_model_that_can_go_on_gets_a_note(groups):
    short, long = groups
    model = model_of({**LLAMA, "max_position_embeddings": 16})
    assert short.counts.lengths.max() > 8 and check_positions(model, short) is None
    length = int(long.shapes(range(2)).rows.max())
    assert check_positions(model, long) == (
        f"the longest sequence has {length} tokens, and the model was made for 16 positions; it may predict "
        "badly beyond them (data.max_length=16 cuts there)"
    )


def test_positions_that_no_part_of_the_model_holds_are_a_note(groups):
    """Bloom's biases are made for any length; its published configs say what it was trained with."""
    model = model_of({"model_type": "bloom", "n_layer": 1, "n_head": 2, "seq_length": 16})
    note = check_positions(model, groups[1])
    assert note is not None and "the model was made for 16 positions; it may predict badly" in note


@pytest.mark.parametrize("family", LIMITED)
def test_a_model_that_has_no_more_positions_is_refused(groups, family):
    short, long = groups
    assert check_positions(model_of(LIMITED[family]), short) is None
    with pytest.raises(
        ValueError, match=r"data\.max_length: the longest .* 16 positions; set data\.max_length=16"
    ):
        check_positions(model_of(LIMITED[family]), long)
    check_max_length(model_of(LIMITED[family]), 16)  # a stream's
    with pytest.raises(ValueError, match=r"sequences may have 17 tokens.*set data\.max_length=16"):
        check_max_length(model_of(LIMITED[family]), 17)
