"""Models whose layers carry a state along the row: every completion behind its prompt in a row of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import plain
import pytest
import torch
import torch.nn.functional as F
from attention_cases import mixed_groups, packed_logps, padded_logps
from families import tiny_model
from harness import make_config, random_groups, run_ranks, write_pairs
from kernel_cases import relative_error
from lora_cases import changed, stored_adapter
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from madpo.trainer.batches.packing import pack
from madpo.trainer.config.schema import Config
from madpo.trainer.data.order import DataOrder
from madpo.trainer.data.training_data import load_data
from madpo.trainer.errors import UserError
from madpo.trainer.model.attention import prefix_sharing as prefix_attention
from madpo.trainer.model.expert_balance import expert_balance
from madpo.trainer.model.flops import passes
from madpo.trainer.model.padded_rows import row_index
from madpo.trainer.model.policy import PolicyWithReference
from madpo.trainer.model.pretrained import load_pretrained
from madpo.trainer.model.startup.attention import choose_attention
from madpo.trainer.model.startup.checks import check_head, check_packing
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.objectives.build import bind
from madpo.trainer.objectives.registry import OBJECTIVES

CPU = torch.device("cpu")
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
STATE = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 4,
    "mamba_chunk_size": 8,
}
STATEFUL: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "falcon_mamba": {"state_size": 4},
    "bamba": {**ATTENTION, **STATE, "attn_layer_indices": [1]},
    "falcon_h1": {**ATTENTION, **STATE, "mamba_d_ssm": 64, "head_dim": 8},
    "recurrent_gemma": {**ATTENTION, "lru_width": 32, "attention_window_size": 16, "head_dim": 8},
    "qwen3_next": {
        **ATTENTION,
        "head_dim": 12,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
}
"""`model_type` -> values; tiny, with every kind of layer."""


@pytest.fixture(autouse=True)
def _registered():
    prefix_attention.register()


def stateful(family: str, attention: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(3)
    sizes = {"vocab_size": 307, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.15}
    config = AutoConfig.for_model(family, **{**sizes, **STATEFUL[family], **changes})
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


NAME = prefix_attention.NAMES["sdpa"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
@pytest.mark.parametrize("family", STATEFUL)
def test_the_check_at_start_finds_the_state_and_gives_rows_of_their_own(family, dtype):
    model = stateful(family, NAME, dtype)
    with pytest.raises(ValueError, match="packed scores differ from single ones"):
        check_packing(model, CPU)
    note = choose_attention(model, "auto", CPU)
    assert "the model's own" in note and "prompts are not shared, and rows are padded" in note
    assert not prefix_attention.shares_rows(model)
    assert passes(model).forward.per_token > 0
    check_packing(model, CPU)
    check_head(model, CPU)


@pytest.mark.parametrize("family", STATEFUL)
def test_log_probs_and_gradients_equal_the_padded_forward(family):
    """Whether the batch was packed with shared prompts or without."""
    groups = mixed_groups()
    theirs = stateful(family, "eager")
    want = padded_logps(theirs, groups)
    weights = torch.randn(len(want), dtype=torch.float64)
    (want * weights).sum().backward()
    truth = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for prefix_sharing in (True, False):
        ours = stateful(family, NAME)
        choose_attention(ours, "auto", CPU)
        got = packed_logps(ours, groups, prefix_sharing)
        assert relative_error(got, want) < 1e-5
        (got * weights).sum().backward()
        for name, parameter in ours.named_parameters():
            if name in truth and truth[name].any():
                assert relative_error(parameter.grad, truth[name]) < 2e-5, name


@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_rows_and_places_by_the_tokens_themselves(prefix_sharing):
    groups = mixed_groups()
    batch = pack(groups, prefix_sharing=prefix_sharing)
    index, cells = row_index(batch.segments)
    rows = [group.prompt + completion for group in groups for completion in group.completions]
    assert len(index) == len(rows) and index.shape[1] == max(map(len, rows))
    for number, row in enumerate(rows):
        assert batch.input_ids[index[number, : len(row)]].tolist() == row
    assert np.array_equal(index.reshape(-1)[cells], np.arange(len(batch.input_ids)))


OWN_WAYS = {
    "bloom": ({"n_head": 4, "n_layer": 2}, "fails on the check's few tokens (TypeError: unsupported operand"),
    "falcon": ({"num_attention_heads": 4, "alibi": True}, "looks its attention up in a table of its own"),
    "stablelm": ({**ATTENTION, "hidden_size": 64}, "do not hand on to their attention the segment table"),
}
"""`model_type` -> values, and why it cannot share rows."""


@pytest.mark.parametrize("family", OWN_WAYS)
def test_a_family_that_attends_in_its_own_way(family, tmp_path):
    """Arithmetic with the mask, ALiBi, a table of attentions, keywords that are not handed on."""
    values, reason = OWN_WAYS[family]
    sizes = {
        "vocab_size": 307,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "initializer_range": 0.15,
        **values,
    }
    torch.manual_seed(3)
    theirs: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    theirs.save_pretrained(tmp_path)
    options: Any = {"kind": AutoModelForCausalLM, "quantization_config": None, "dtype": torch.float32}
    ours = load_pretrained(str(tmp_path), None, attention=NAME, **options).model
    assert reason in choose_attention(ours, "auto", CPU)
    check_head(ours, CPU)
    groups = mixed_groups()
    assert relative_error(packed_logps(ours, groups), padded_logps(theirs, groups)) < 1e-5


def test_code_that_fails_in_both_ways_is_refused_in_one_line(monkeypatch):
    model = stateful("mamba", NAME)
    monkeypatch.setattr(type(model.backbone), "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(
        UserError, match=r"tokens \(ZeroDivisionError: division by zero\); nor can it run"
    ) as info:
        choose_attention(model, "auto", CPU)
    assert "\n" not in str(info.value)


def test_what_is_inexact_in_rows_of_its_own_too_is_refused():
    model = tiny_model("Gemma 3", NAME, use_bidirectional_attention=True)
    with pytest.raises(UserError, match="packed scores differ from single ones"):
        choose_attention(model, "auto", CPU)
    assert prefix_attention.shares_rows(model)


def test_the_experts_loss_knows_no_padding():
    """Packed, a prompt of two completions counts once; the rows' padding does not count."""
    (group,) = random_groups(1, seed=4)
    (alone,) = random_groups(1, seed=5, completions=1)
    theirs: Any = stateful("qwen3_next", "eager")
    ours = stateful("qwen3_next", NAME)
    choose_attention(ours, "auto", CPU)
    entry = OBJECTIVES["nll"]
    module = PolicyWithReference(ours, None, bind(entry.params()), 2**20, balance=expert_balance(ours, 0.5))
    module(pack([group, alone], token_scale=1.0))
    logits: list[Any] = []
    for number, part in enumerate((*group.completions, *alone.completions)):
        prompt = alone.prompt if number == 2 else group.prompt
        ids = torch.tensor([prompt + part])
        out = theirs(input_ids=ids, output_router_logits=True, use_cache=False).router_logits
        logits.append([x.view(ids.shape[1], -1)[len(prompt) if number == 1 else 0 :] for x in out])
    layers = tuple(torch.cat(x) for x in zip(*logits, strict=True))
    balance = expert_balance(theirs, 0.5)
    assert balance is not None
    assert module.stats["aux_loss"].item() == pytest.approx(balance(layers).item(), rel=1e-6)


def stored(folder: Path, tokenizer_folder: Path, family: str) -> Config:
    """A run that starts from a tiny model of the family."""
    start = folder / "start"
    stateful(family, "eager", vocab_size=311).save_pretrained(start)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(start)
    tree = {
        "model": {"model_name_or_path": str(start)},
        "data": {"dataset_name": str(write_pairs(folder / "pairs.jsonl", 12))},
    }
    return make_config(folder, tree)


@pytest.mark.ranks
@pytest.mark.parametrize(
    "family, checkpointing",
    [*((family, True) for family in STATEFUL), ("mamba", False), ("qwen3_next", False)],
)
def test_the_gradients_of_two_zero3_ranks_are_those_of_plain_pytorch(
    tmp_path, tokenizer_folder, family, checkpointing
):
    config = changed(
        stored(tmp_path, tokenizer_folder, family), model={"gradient_checkpointing": checkpointing}
    )
    groups = load_data(config, load_tokenizer(config.model), training=True).train
    assert groups is not None
    batch = [groups[index] for index in DataOrder(len(groups), config.seed).take(0, 8)]
    model: Any = AutoModelForCausalLM.from_pretrained(str(config.model.model_name_or_path))
    logps = plain.padded_logps(model, batch).view(-1, 2)
    ratios = logps - logps.detach()
    (-F.logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1]))).mean().backward()
    gradients = run_ranks(2, plain.zero3_steps, config, 1, checks=True)[0][0][1]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert relative_error(gradients[name], parameter.grad) < 2e-5, name


@pytest.mark.ranks
@pytest.mark.parametrize("family", ["mamba2", "qwen3_next"])
def test_an_adapter_on_two_zero3_ranks_has_the_gradients_of_one_rank_without(
    tmp_path, tokenizer_folder, family
):
    """Where nothing before the first layer has a gradient."""
    config = stored(tmp_path, tokenizer_folder, family)
    modules = {"mamba2": ["in_proj"], "qwen3_next": ["in_proj_qkvz", "out_proj"]}[family]
    base = Path(str(config.model.model_name_or_path))
    adapter = stored_adapter(tmp_path / "adapter", base, tokenizer_folder, target_modules=modules)
    config = changed(config, model={"model_name_or_path": str(adapter)})
    alone = changed(config, deepspeed={"zero_optimization": {"stage": 2}})
    want = run_ranks(1, plain.zero3_steps, alone, 2, checks=True)[0]
    plain.compare(run_ranks(2, plain.zero3_steps, config, 2, checks=True)[0], want)
