"""Packed, prefix-sharing, padding-free scores equal the plain padded Hugging Face forward."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, tiny_config, tiny_model
from harness import random_groups
from kernel_cases import relative_error

from madpo.trainer.data.packing import Segment, pack
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.model import prefix_attention
from madpo.trainer.model.policy import (
    output_head,
    refuse_unless_head_is_known,
    refuse_unless_packing_is_exact,
    scored_hidden,
)
from madpo.trainer.model.prefix_attention import SegmentTable
from madpo.trainer.objectives.base import segment_sum

NAME = prefix_attention.NAMES["sdpa"]
SDPA_ONLY = {
    "gpt-oss": "attention sinks",
    "Llama 4": "masks other than causal ones and sliding windows",
}


@pytest.fixture(autouse=True)
def _registered():
    prefix_attention.register()


def packed_logps(model: Any, groups: list[TokenGroup]) -> torch.Tensor:
    batch = pack(groups)
    hidden = scored_hidden(model, batch, SegmentTable(batch.segments))
    logits = output_head(model).transform(model.lm_head(hidden))
    tokens = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    return segment_sum(tokens, batch.seq_lengths)


def padded_logps(model: Any, groups: list[TokenGroup]) -> torch.Tensor:
    out = []
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([group.prompt + completion + [0] * 5])
            mask = torch.tensor([[1] * (ids.shape[1] - 5) + [0] * 5])
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
            first = len(group.prompt) - 1
            rows = logits[first : first + len(completion)].log_softmax(-1)
            out.append(rows.gather(1, torch.tensor(completion)[:, None]).double().sum())
    return torch.stack(out)


def mixed_groups() -> list[TokenGroup]:
    """One, two and seven completions; a prompt of one token; a completion of one token."""
    one, seven = random_groups(2, 1, completions=1), random_groups(1, 2, completions=7)
    short = TokenGroup([5], [[7], [9, 11, 13]], [(0, 1, None)])
    return [*random_groups(3), *one, short, *seven]


def test_log_probs_and_gradients_equal_the_padded_forward():
    """Padded on the right, as a batch would be; test_families.py does without for every family."""
    groups = mixed_groups()
    theirs, ours = tiny_model("Llama 3", "eager", vocab_size=307), tiny_model("Llama 3", NAME, vocab_size=307)
    weights = torch.randn(sum(len(group.completions) for group in groups), dtype=torch.float64)
    want, got = padded_logps(theirs, groups), packed_logps(ours, groups)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    (want * weights).sum().backward()
    (got * weights).sum().backward()
    truth = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, truth[name].grad) < 1e-5, name


def test_nothing_leaks_between_completions_or_groups():
    model = tiny_model("Llama 3", NAME, vocab_size=307)
    groups = random_groups(3)
    with torch.no_grad():
        before = packed_logps(model, groups)
        changed = [(token + 1) % 300 for token in groups[1].completions[0]]
        groups[1].completions[0] = changed
        after = packed_logps(model, groups)
    same = torch.tensor([True, True, False, True, True, True])
    assert torch.equal(before[same], after[same])
    assert before[2] != after[2]


def test_the_segment_table_is_demanded():
    model = tiny_model("Llama 3", NAME, vocab_size=307)
    with pytest.raises(ValueError, match="segments"):
        model(input_ids=torch.tensor([[5, 6, 7]]))


def varlen_in_plain_torch(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale,
    causal,
    window_size,
    softcap,
):
    """flash_attn_varlen_func as its documentation defines it: causal at the bottom right."""
    assert causal and max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    out = []
    for i in range(len(cu_seqlens_q) - 1):
        rows, columns = slice(*cu_seqlens_q[i : i + 2]), slice(*cu_seqlens_k[i : i + 2])
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[columns]) * softmax_scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        queries, keys = scores.shape[1:]
        distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
        hidden = distance < 0
        if window_size[0] >= 0:
            hidden |= distance > window_size[0]
        scores = scores.masked_fill(hidden, float("-inf"))
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[columns]))
    return torch.cat(out)


@pytest.fixture
def _flash(monkeypatch):
    stand_in = types.ModuleType("flash_attn")
    stand_in.flash_attn_varlen_func = varlen_in_plain_torch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)


@pytest.mark.usefixtures("_flash")
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in SDPA_ONLY])
def test_the_varlen_call_describes_the_same_attention(family):
    """The arguments for flash-attn, which runs on GPUs only, checked against its documented meaning."""
    models = [tiny_model(family, name, vocab_size=307) for name in prefix_attention.NAMES.values()]
    groups = mixed_groups()
    with torch.no_grad():
        want, got = (packed_logps(model, groups) for model in models)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)


@pytest.mark.usefixtures("_flash")
@pytest.mark.parametrize("family, what", SDPA_ONLY.items())
def test_flash_refuses_what_it_does_not_compute(family, what):
    model = tiny_model(family, prefix_attention.NAMES["flash"], vocab_size=307)
    with pytest.raises(ValueError, match=f"flash does not compute this model's {what}; set it to sdpa"):
        packed_logps(model, mixed_groups())


def test_flash_without_its_package_says_what_to_install():
    with pytest.raises(ValueError, match=r"pip install 'madpo\[flash-attn\]'"):
        prefix_attention.require("flash")


def test_the_check_at_start_refuses_a_head_that_does_something_else():
    model = tiny_model("Llama 3", NAME)
    model.config.logit_scale = 2.0  # which a Llama ignores
    with pytest.raises(ValueError, match="its logits differ from those of its output weight"):
        refuse_unless_head_is_known(model, torch.device("cpu"))


STATEFUL: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4},
    "falcon_mamba": {"state_size": 4},
    "qwen3_next": {
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
}


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
@pytest.mark.parametrize("family", STATEFUL)
def test_the_check_at_start_refuses_layers_that_carry_a_state(family, dtype):
    sizes = {"vocab_size": 307, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.15}
    config = transformers.AutoConfig.for_model(family, **sizes, **STATEFUL[family])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=NAME)
    with pytest.raises(ValueError, match="packed scores differ from single ones"):
        refuse_unless_packing_is_exact(model, torch.device("cpu"))


@DTYPES
def test_the_check_at_start_refuses_tokens_that_see_those_to_come(dtype):
    """Shared, a prompt cannot see what follows it."""
    model = tiny_model("Gemma 3", NAME, use_bidirectional_attention=True).to(dtype)
    with pytest.raises(ValueError, match="packed scores differ from single ones"):
        refuse_unless_packing_is_exact(model, torch.device("cpu"))


def test_a_few_tokens_that_rounding_sends_to_other_experts_are_no_alarm():
    layers = {"num_hidden_layers": 24, "layer_types": ["sliding_attention", "full_attention"] * 12}
    config = tiny_config("gpt-oss", num_local_experts=32, num_experts_per_tok=4, **layers)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval()
    refuse_unless_packing_is_exact(model, torch.device("cpu"))
    refuse_unless_packing_is_exact(model.to(torch.bfloat16), torch.device("cpu"))


def test_masks_that_a_model_forms_by_itself_are_refused():
    model = tiny_model("Llama 3", NAME)
    row = torch.tensor([[5, 6, 7]])
    own = torch.zeros(1, 1, 3, 3)
    with pytest.raises(ValueError, match="what its tokens see is not known"):
        model(row, attention_mask=own, segments=SegmentTable((Segment(0, 3, 0, 0),)))


def test_unknown_parts_of_an_attention_are_refused():
    model = tiny_model("Llama 3", NAME)
    with pytest.raises(ValueError, match="attention uses head_mask, which"):
        model(torch.tensor([[5, 6]]), segments=SegmentTable((Segment(0, 2, 0, 0),)), head_mask=torch.ones(4))
