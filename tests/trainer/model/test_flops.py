"""FLOPs of packed steps against torch's count of what a forward and backward really multiply."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from harness import LLAMA, random_groups
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from madpo.trainer.batches.cost import Cost, work_of
from madpo.trainer.batches.packing import PackedBatch, pack
from madpo.trainer.config.peft import PeftConfig
from madpo.trainer.data.lengths import Shapes
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.model import lora
from madpo.trainer.model.attention import prefix_sharing
from madpo.trainer.model.attention.prefix_sharing import MaskRule
from madpo.trainer.model.flops import passes, step_cost
from madpo.trainer.model.freeze import freeze
from madpo.trainer.model.policy import PolicyWithReference
from madpo.trainer.model.recompute import checkpoint_layers
from madpo.trainer.model.reward import RewardModel
from madpo.trainer.objectives.build import bind, build
from madpo.trainer.objectives.reward import BradleyTerryParams
from madpo.trainer.scoring_module import ReferenceScorer

NO_DROPOUT = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 48,
    },
    "gemma2": {"model_type": "gemma2", "head_dim": 8, "sliding_window": 8},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, **NO_DROPOUT},
}


def make(seed: int, **changes: Any) -> PreTrainedModel:
    prefix_sharing.register()
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**{**LLAMA, **changes})
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="prefix_sharing")
    if changes.get("model_type") == "qwen2_moe":
        model.set_experts_implementation("eager")  # whose products are counted
    return model


def with_reference(policy: PreTrainedModel, reference: ReferenceScorer | None, loss_type: str = "dpo"):
    return PolicyWithReference(policy, reference, build(loss_type), 2**30)


def counted(module: Any, batch: PackedBatch, backward: bool = True) -> tuple[int, int]:
    """FLOPs of matrices, and of products of batches of matrices: attention, where it is written out."""
    with FlopCounterMode(display=False) as counter:
        loss = module(batch)[0]
        if backward:
            loss.backward()
    by_name = {str(op).removeprefix("aten."): n for op, n in counter.get_flop_counts()["Global"].items()}
    return sum(by_name.get(name, 0) for name in ("mm", "addmm")), by_name.get("bmm", 0)


def of_matrices(cost: Cost, batch: PackedBatch) -> float:
    return cost.per_token * len(batch.input_ids) + cost.per_row * len(batch.targets)


@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
def test_matrices_are_counted_exactly(changes):
    module, batch = (
        with_reference(make(0, **changes), ReferenceScorer(make(1, **changes))),
        pack(random_groups(3)),
    )
    assert counted(module, batch)[0] == of_matrices(step_cost(module).model, batch)
    with torch.no_grad():
        want = counted(module, batch, backward=False)[0]
    # The head forms the gradients with the loss, unless no one wants them.
    assert want == of_matrices(step_cost(module, training=False).model, batch)


@pytest.mark.parametrize("part", ["embeddings", "head", "model.layers.0.*", "*.down_proj.*"])
def test_frozen_weights_have_no_gradient_of_their_own(part):
    policy, batch = make(0), pack(random_groups(3))
    freeze(policy, [part])
    module = with_reference(policy, ReferenceScorer(make(1)))
    assert counted(module, batch)[0] == of_matrices(step_cost(module).model, batch)


def test_nothing_goes_back_behind_the_first_trained_layer():
    policy, batch = make(0), pack(random_groups(3))
    whole = step_cost(with_reference(policy, None, "simpo")).model
    freeze(policy, ["embeddings", "model.layers.0.*"])
    module = with_reference(policy, None, "simpo")
    got = step_cost(module).model
    assert counted(module, batch)[0] == of_matrices(got, batch)
    layers = passes(policy).forward.per_token
    assert whole.per_token - got.per_token == pytest.approx(layers)  # half the layers, two thirds of each


def test_adapters_train_little_and_the_reference_goes_without_them():
    pytest.importorskip("peft")
    policy, batch = make(0), pack(random_groups(3))
    lora.attach(policy, lora.new_config(PeftConfig(lora_r=4), "base", None, False), lora.POLICY)
    module = with_reference(policy, ReferenceScorer(policy, partial(lora.switch, adapter=None)))
    # The first layer counts as a whole, but the inputs of its first matrices need no gradient.
    attention: Any = policy.get_submodule("model.layers.0.self_attn")
    first = [getattr(attention, f"{name}_proj") for name in "qkv"]
    sizes = sum(m.base_layer.weight.numel() + m.lora_A["default"].weight.numel() for m in first)
    want = counted(module, batch)[0]
    assert of_matrices(step_cost(module).model, batch) == want + 2 * sizes * len(batch.input_ids)


def test_checkpointing_computes_the_layers_again():
    """But for the last matrix of each, whose result backward has no use for."""
    policy, batch = make(0).train(), pack(random_groups(3))
    module = with_reference(policy, ReferenceScorer(make(1)))
    want = counted(module, batch)[0]
    checkpoint_layers(policy, selective=False)
    module.repeats_layers = True
    cost = step_cost(module)
    last: Any = policy.get_submodule("model.layers.0.mlp.down_proj")
    spared = 2 * 2 * last.weight.numel() * len(batch.input_ids)
    assert of_matrices(cost.model, batch) == want
    assert counted(module, batch)[0] == want + of_matrices(cost.again, batch) - spared


def test_an_objective_of_the_whole_batch_scores_twice_and_in_parts_computes_the_policy_twice():
    module = with_reference(make(0), ReferenceScorer(make(1)), "beta_dpo")
    cost, dpo = step_cost(module), step_cost(with_reference(make(0), ReferenceScorer(make(1))))
    assert cost.model == dpo.model
    head = 2 * module.head.weight.numel()
    assert cost.again == Cost(per_row=head)
    once_more = step_cost(with_reference(make(0), None, "simpo"), training=False).model
    assert cost.again + cost.again_in_parts == once_more

    lengths = np.array([5, 7])
    shapes = Shapes(lengths, np.array([1, 1]), lengths)
    alone, apart = (work_of(shapes, cost, plan).flops_again for plan in ([[[0, 1]]], [[[0], [1]]]))
    assert (alone, apart) == (12 * head, once_more.of(shapes).sum())


def test_a_reward_model_has_no_head_of_its_own_to_count():
    from transformers import AutoModelForSequenceClassification

    prefix_sharing.register()
    config = AutoConfig.for_model(**LLAMA, num_labels=1)
    model: Any = AutoModelForSequenceClassification.from_config(config, attn_implementation="prefix_sharing")
    module, batch = (
        RewardModel(model, bind(BradleyTerryParams()), has_new_layer=True),
        pack(random_groups(3)),
    )
    head = 3 * 2 * LLAMA["hidden_size"] * len(batch.lengths)
    assert counted(module, batch)[0] == of_matrices(step_cost(module).model, batch) + head


def test_attention_counts_what_is_seen():
    """Gemma 2's is written out, and torch counts all scores, also those that are masked: the count below."""
    groups = random_groups(3)
    changes, batch = FAMILIES["gemma2"], pack(groups)
    module = with_reference(make(0, **changes), None, "simpo")
    scores = sum((end - start) * (end - start + last - first) for start, end, first, last in batch.segments)
    each = 4 * LLAMA["num_attention_heads"] * changes["head_dim"]
    assert counted(module, batch)[1] == 3 * 2 * each * scores  # forward and twice backward, two layers
    cost = step_cost(module).model
    assert cost.per_attention_pair == {8: 3 * each, None: 3 * each}
    seen = {window: seen_by_masks(batch, module.policy.config, window) for window in (8, None)}
    assert cost.of(shapes_of(groups)).sum() - of_matrices(cost, batch) == 3 * each * sum(seen.values())
    assert seen[8] < seen[None] < scores


def shapes_of(groups: list[TokenGroup]) -> Shapes:
    lengths = [[len(completion) for completion in group.completions] for group in groups]
    prompts = np.array([len(group.prompt) for group in groups])
    return Shapes(prompts, np.array(list(map(len, lengths))), np.concatenate(lengths))


def seen_by_masks(batch: PackedBatch, config: Any, window: int | None) -> int:
    """The pairs that the masks of a layer let through."""

    def sees(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (key > query - (window or 10**9))

    rule, total = MaskRule(sees, config), 0
    for start, end, prompt_start, prompt_end in batch.segments:
        keys = end - start + prompt_end - prompt_start
        total += int(rule.mask(end - start, keys, torch.device("cpu")).sum())
    return total
