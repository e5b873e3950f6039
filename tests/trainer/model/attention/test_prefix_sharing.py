"""Packed, prefix-sharing, padding-free scores equal the plain padded Hugging Face forward."""

from __future__ import annotations

import pytest
import torch
import transformers
from attention_cases import mixed_groups, packed_logps, padded_logps
from families import tiny_config, tiny_model
from harness import random_groups
from kernel_cases import relative_error

from madpo.trainer.batches.packing import Segment
from madpo.trainer.model.attention import prefix_sharing as prefix_attention
from madpo.trainer.model.attention.prefix_sharing import SegmentTable
from madpo.trainer.model.startup.checks import check_head, check_packing

NAME = prefix_attention.NAMES["sdpa"]


@pytest.fixture(autouse=True)
def _registered():
    prefix_attention.register()


SHARING = pytest.mark.parametrize("prefix_sharing", [True, False], ids=["shared", "unshared"])


@SHARING
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "activation-checkpointing"])
def test_log_probs_and_gradients_equal_the_padded_forward(prefix_sharing, checkpointing):
    """Padded on the right, as a batch would be; test_families.py does without."""
    groups = mixed_groups()
    theirs, ours = tiny_model("Llama 3", "eager", vocab_size=307), tiny_model("Llama 3", NAME, vocab_size=307)
    if checkpointing:
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ours.train()
    weights = torch.randn(sum(len(group.completions) for group in groups), dtype=torch.float64)
    want, got = padded_logps(theirs, groups), packed_logps(ours, groups, prefix_sharing)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    (want * weights).sum().backward()
    (got * weights).sum().backward()
    truth = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, truth[name].grad) < 1e-5, name


@SHARING
@pytest.mark.parametrize("family", ["Llama 3", "Gemma 2", "Gemma 3", "gpt-oss"])
def test_nothing_leaks_between_completions_or_groups(family, prefix_sharing):
    """One completion of a group of three changes: every other log-prob is the same to the bit."""
    model = tiny_model(family, NAME, vocab_size=307)
    groups = random_groups(3, completions=3)
    with torch.no_grad():
        before = packed_logps(model, groups, prefix_sharing)
        groups[1].completions[1] = [(token + 1) % 300 for token in groups[1].completions[1]]
        after = packed_logps(model, groups, prefix_sharing)
    same = torch.arange(9) != 4
    assert torch.equal(before[same], after[same])
    assert before[4] != after[4]


def test_the_segment_table_is_demanded():
    model = tiny_model("Llama 3", NAME, vocab_size=307)
    with pytest.raises(ValueError, match="segment table"):
        model(input_ids=torch.tensor([[5, 6, 7]]))


def test_the_check_at_start_refuses_a_head_that_does_something_else():
    model = tiny_model("Llama 3", NAME)
    model.config.logit_scale = 2.0  # which a Llama ignores
    with pytest.raises(ValueError, match="its logits differ from those of its output weight"):
        check_head(model, torch.device("cpu"))


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
def test_the_check_at_start_refuses_tokens_that_see_those_to_come(dtype):
    """Shared, a prompt cannot see what follows it."""
    model = tiny_model("Gemma 3", NAME, use_bidirectional_attention=True).to(dtype)
    with pytest.raises(ValueError, match="packed scores differ from single ones"):
        check_packing(model, torch.device("cpu"))


def test_a_few_tokens_that_rounding_sends_to_other_experts_are_no_alarm():
    layers = {"num_hidden_layers": 24, "layer_types": ["sliding_attention", "full_attention"] * 12}
    config = tiny_config("gpt-oss", num_local_experts=32, num_experts_per_tok=4, **layers)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval()
    check_packing(model, torch.device("cpu"))
    check_packing(model.to(torch.bfloat16), torch.device("cpu"))


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
