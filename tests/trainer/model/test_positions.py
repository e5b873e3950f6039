"""Rope types whose frequencies depend on the length of the sequence: each sequence has those of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from families import tiny_config
from kernel_cases import relative_error
from transformers import AutoConfig, AutoModelForCausalLM

from madpo.trainer.batches.packing import pack
from madpo.trainer.batches.steps import StepRules, check_rows_fit
from madpo.trainer.data.dataset import GroupDataset
from madpo.trainer.data.lengths import PositionBorder, shapes_of
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.errors import UserError
from madpo.trainer.model.attention import prefix_sharing
from madpo.trainer.model.attention.prefix_sharing import SegmentTable, shares_rows
from madpo.trainer.model.backbone import last_hidden, scored_hidden
from madpo.trainer.model.positions import encode_by_sequence, position_borders
from madpo.trainer.model.startup.attention import choose_attention
from madpo.trainer.model.startup.checks import check_packing
from madpo.trainer.model.startup.slices import check_slicing
from madpo.trainer.objectives.base import Item

CPU, BORDER = torch.device("cpu"), 16
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.0, 1.1, 1.2, 1.3, 1.4],
    "long_factor": [1.0, 2.0, 4.0, 9.0, 16.0, 25.0],
    "factor": 4.0,
    "original_max_position_embeddings": BORDER,
}
LAYERS = {"sliding_attention": {"rope_type": "default", "rope_theta": 50.0}, "full_attention": DYNAMIC}
SHORT: dict[str, Any] = {"max_position_embeddings": BORDER}
MODELS: dict[str, dict[str, Any]] = {
    "longrope": {
        "family": "Phi-3",
        "rope_parameters": LONG,
        "max_position_embeddings": 4 * BORDER,
        "original_max_position_embeddings": BORDER,
    },
    "dynamic": {"family": "Llama 3", "rope_parameters": DYNAMIC, **SHORT},
    "dynamic in some layers": {"family": "Gemma 3", "rope_parameters": LAYERS, **SHORT},
}


def model_of(name: str, attention: str) -> Any:
    torch.manual_seed(3)
    config = tiny_config(**MODELS[name])
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)


def ours(name: str) -> Any:
    prefix_sharing.register()
    model = model_of(name, prefix_sharing.NAMES["sdpa"])
    encode_by_sequence(model)
    return model


def groups() -> list[TokenGroup]:
    """Completions on both sides of the border, at it, and of one length beyond it; the longest first."""
    draw = lambda count: torch.randint(3, 90, (count,)).tolist()  # noqa: E731
    torch.manual_seed(1)
    lengths = [(30, [9, 2, 5]), (3, [4, 5]), (12, [2, 9, 4, 9]), (20, [3, 3]), (12, [3, 4])]
    return [TokenGroup(draw(prompt), [draw(x) for x in completions], []) for prompt, completions in lengths]


def packed(model: Any, order: list[TokenGroup], shares: bool = True) -> torch.Tensor:
    """(M, H) at the positions that predict the completions."""
    shared = shares & shapes_of(order).shares_prompts(position_borders(model))
    batch = pack(order, prefix_sharing=shared.tolist())
    return scored_hidden(model, batch, SegmentTable(batch.segments))


def alone(name: str, order: list[TokenGroup]) -> torch.Tensor:
    """(M, H) by the unmodified model, new for every sequence, so that it remembers no other."""
    rows = []
    for group in order:
        for completion in group.completions:
            ids = torch.tensor([group.prompt + completion])
            hidden = model_of(name, "eager").base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            rows.append(hidden[len(group.prompt) - 1 : -1])
    return torch.cat(rows)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_sequence_is_encoded_as_if_it_were_alone(name):
    """Whatever is packed beside it, or was before; with prompts shared where that is exact."""
    model, want = ours(name), alone(name, groups())
    for shares in (True, False):
        assert relative_error(packed(model, groups(), shares), want) < 1e-5
    last = groups()[-1:]
    assert relative_error(packed(model, last), alone(name, last)) < 1e-5
    plain = model_of(name, prefix_sharing.NAMES["sdpa"])
    assert relative_error(packed(plain, groups()), want) > 1e-2  # what it is for


def test_which_prompts_are_shared():
    shapes = shapes_of(groups())
    for varies, want in ((False, [1, 1, 0, 1, 1]), (True, [0, 1, 0, 1, 1])):
        border = PositionBorder(BORDER, varies)
        assert shapes.shares_prompts([border]).tolist() == [bool(x) for x in want]
        rules = StepRules(Item.EDGE, 512, borders=(border,))
        batch = pack(groups(), prefix_sharing=shapes.shares_prompts([border]).tolist())
        assert shapes.tokens(rules.shared(shapes)).sum() == len(batch.input_ids)
    assert shapes.shares_prompts([]).all()


def test_a_group_that_does_not_share_its_prompt_must_fit():
    rules = StepRules(Item.EDGE, 40, borders=(PositionBorder(BORDER, varies=False),))
    check_rows_fit(dataset_of(12, [2, 3]), rules)
    with pytest.raises(UserError, match="micro_batch_tokens: 40 cannot hold a group of 41 tokens"):
        check_rows_fit(dataset_of(12, [2, 15]), rules)


def dataset_of(prompt: int, completions: list[int]) -> GroupDataset:
    """One group of these lengths."""
    row = {
        "prompt": [3] * prompt,
        "completions": [[3] * x for x in completions],
        "completion_lengths": completions,
        "num_tokens": prompt + sum(completions),
        "num_completion_tokens": sum(completions),
        "num_scored_tokens": sum(completions),
        "num_sequences": len(completions),
        **dict.fromkeys(("num_edges", "num_labels"), 0),
    }
    return GroupDataset(Dataset.from_list([row]), "made", "made")


@pytest.mark.parametrize("name", MODELS)
def test_the_check_at_the_start_goes_beyond_the_border(name):
    model = ours(name)
    check_packing(model, CPU, longest=BORDER + 1)
    plain = model_of(name, prefix_sharing.NAMES["sdpa"])  # which looks at the whole row
    with pytest.raises(UserError, match="packed scores differ from single ones"):
        check_packing(plain, CPU, longest=BORDER + 1)
    with pytest.raises(UserError, match=f"set it to 1, or data.max_length={BORDER}"):
        check_slicing(model, None, CPU, longest=BORDER + 1)  # type: ignore[arg-type]


@torch.no_grad()
def test_rows_of_their_own():
    """Padding does not make a sequence longer."""
    prefix_sharing.register()
    config = AutoConfig.for_model(
        "qwen3_next",
        vocab_size=101,
        hidden_size=32,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=0,
        intermediate_size=32,
        initializer_range=0.15,
        rope_parameters={**DYNAMIC, "partial_rotary_factor": 0.5},
        **SHORT,
    )
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=prefix_sharing.NAMES["sdpa"])
    encode_by_sequence(model)
    choose_attention(model, "auto", CPU, longest=BORDER + 1)
    assert not shares_rows(model)
    batch = pack(groups())
    hidden = last_hidden(model, batch, SegmentTable(batch.segments))
    sequences = [(group.prompt, completion) for group in groups() for completion in group.completions]
    for (prompt, completion), end in zip(sequences, batch.ends.tolist(), strict=True):
        single = pack([TokenGroup(prompt, [completion], [])])
        want = last_hidden(model, single, SegmentTable(single.segments))
        count = len(completion)
        assert relative_error(hidden[end + 1 - count : end + 1], want[-count:]) < 1e-5
