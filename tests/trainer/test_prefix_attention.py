"""Packed, prefix-sharing, padding-free scores equal the plain padded Hugging Face forward."""

from __future__ import annotations

import copy
import sys
import types
from typing import Any

import pytest
import torch
import transformers
from harness import random_groups
from kernel_cases import relative_error

from madpo.trainer.data.packing import pack
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
SIZES: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=12),
    "mistral-window": transformers.MistralConfig(**SIZES, sliding_window=9, head_dim=12),
    "gemma2-softcap-window": transformers.Gemma2Config(
        **SIZES, head_dim=12, sliding_window=7, query_pre_attn_scalar=12
    ),
    "phi-bias": transformers.PhiConfig(**SIZES),
    "cohere-scale": transformers.CohereConfig(**SIZES, logit_scale=0.25),
    "granite-scaling": transformers.GraniteConfig(**SIZES, logits_scaling=4.0),
    "hyperclovax-scaling": transformers.HyperCLOVAXConfig(**SIZES, logits_scaling=4.0, head_dim=12),
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


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_equal_the_padded_forward(family):
    config = copy.deepcopy(FAMILIES[family])
    groups = mixed_groups()
    eager: Any = transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation="eager"
    )
    packed: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    packed.load_state_dict(eager.state_dict())
    weights = torch.randn(sum(len(group.completions) for group in groups), dtype=torch.float64)
    want, got = padded_logps(eager, groups), packed_logps(packed, groups)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    (want * weights).sum().backward()
    (got * weights).sum().backward()
    truth = dict(eager.named_parameters())
    for name, parameter in packed.named_parameters():
        assert relative_error(parameter.grad, truth[name].grad) < 1e-5, name


def test_nothing_leaks_between_completions_or_groups():
    model: Any = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"], attn_implementation=NAME)
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
    model: Any = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"], attn_implementation=NAME)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_varlen_call_describes_the_same_attention(family, monkeypatch):
    """The arguments for flash-attn, which runs on GPUs only, checked against its documented meaning."""
    stand_in = types.ModuleType("flash_attn")
    stand_in.flash_attn_varlen_func = varlen_in_plain_torch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    models: list[Any] = [
        transformers.AutoModelForCausalLM.from_config(
            copy.deepcopy(FAMILIES[family]), attn_implementation=prefix_attention.NAMES[name]
        )
        for name in ("sdpa", "flash")
    ]
    models[1].load_state_dict(models[0].state_dict())
    groups = mixed_groups()
    with torch.no_grad():
        want, got = (packed_logps(model, groups) for model in models)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)


def test_flash_without_its_package_says_what_to_install():
    with pytest.raises(ValueError, match=r"pip install 'madpo\[flash-attn\]'"):
        prefix_attention.require("flash")


def small(config: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=NAME)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_at_start_passes_models_that_pack_exactly(family):
    refuse_unless_packing_is_exact(small(copy.deepcopy(FAMILIES[family])), torch.device("cpu"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_at_start_passes_heads_that_are_known(family):
    refuse_unless_head_is_known(small(copy.deepcopy(FAMILIES[family])), torch.device("cpu"))


def test_the_check_at_start_refuses_a_head_that_does_something_else():
    config = copy.deepcopy(FAMILIES["llama"])
    config.logit_scale = 2.0  # which a Llama ignores
    with pytest.raises(ValueError, match="its logits differ from those of its output weight"):
        refuse_unless_head_is_known(small(config), torch.device("cpu"))


def test_the_check_at_start_refuses_layers_that_carry_a_state():
    config = transformers.MambaConfig(vocab_size=307, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="packed scores differ from single ones"):
        refuse_unless_packing_is_exact(model, torch.device("cpu"))


def test_attention_sinks_are_refused():
    model = small(
        transformers.GptOssConfig(
            **SIZES,
            head_dim=12,
            num_local_experts=2,
            num_experts_per_tok=1,
            layer_types=["full_attention"] * 3,
        )
    )
    with pytest.raises(ValueError, match="attention uses s_aux"):
        refuse_unless_packing_is_exact(model, torch.device("cpu"))
