"""Policy and reference in one interleaved forward: to the bit what two passes give, or two passes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, tiny_model
from harness import random_groups
from torch import Tensor

from madpo.trainer.batches.packing import PackedBatch, pack
from madpo.trainer.config.peft import PeftConfig
from madpo.trainer.model import lora
from madpo.trainer.model.attention import prefix_sharing
from madpo.trainer.model.expert_balance import expert_balance
from madpo.trainer.model.policy import PolicyWithReference
from madpo.trainer.model.startup.interleave import interleave_reference
from madpo.trainer.objectives.build import bind
from madpo.trainer.objectives.registry import OBJECTIVES
from madpo.trainer.scoring_module import Mode, ReferenceScorer

CPU = torch.device("cpu")


def adapted(
    family: str = "Llama 3", frozen_copy: bool = False, trained: bool = True, coef: float = 0.0, **peft: Any
) -> PolicyWithReference:
    """A tiny model with an adapter that, if `trained`, has an effect; the reference is the model without it,
    or with a frozen copy that has another effect."""
    prefix_sharing.register()
    model = tiny_model(family, prefix_sharing.NAMES["sdpa"])
    settings = lora.new_config(PeftConfig(**peft), "x", None, False)
    lora.attach(model, settings, lora.POLICY)
    if frozen_copy:
        lora.attach(model, settings, lora.REFERENCE)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and trained:
            torch.nn.init.normal_(parameter, std=0.1)
    reference = ReferenceScorer(model, partial(lora.switch, adapter=lora.REFERENCE if frozen_copy else None))
    entry = OBJECTIVES["dpo"]
    balance = expert_balance(model, coef)
    return PolicyWithReference(model, reference, bind(entry.params()), 2**20, balance=balance).train()


def a_batch() -> PackedBatch:
    return pack(random_groups(3, vocab=VOCAB), scale=1.0)


def outcome(module: PolicyWithReference) -> dict[str, Tensor]:
    """Loss, log-probs of both models, and all gradients."""
    module.zero_grad()
    loss, logps, ref_logps, *_ = module(a_batch())
    assert loss is not None and logps is not None and ref_logps is not None
    loss.backward()
    gradients: dict[str, Any] = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    return {"loss": loss, "logps": logps, "ref_logps": ref_logps, **gradients}


def calls(module: PolicyWithReference) -> list[bool]:
    """Whether gradients were on, for every call of the first layer in a forward and backward pass."""
    seen: list[bool] = []
    layer: Any = module.policy.model.layers[0]
    handle = layer.input_layernorm.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    outcome(module)
    handle.remove()
    return seen


def compare(module: PolicyWithReference) -> None:
    want = outcome(module)
    interleave_reference(module, CPU)
    assert module.interleaved is not None and not module.notes
    got = outcome(module)
    assert got.keys() == want.keys() and len(got) > 3
    assert not torch.equal(got["logps"], got["ref_logps"]), "the adapter must matter"
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_bit_for_bit_as_in_two_passes(family):
    compare(adapted(family))


OPTIONS: dict[str, dict[str, Any]] = {
    "frozen-copy": {"frozen_copy": True},
    "dora": {"use_dora": True},
    "trained-head": {"lora_modules_to_save": ["lm_head"], "family": "Mistral"},
    "attention-alone": {"lora_target_modules": ["q_proj", "v_proj"]},
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "activation-checkpointing"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_bit_for_bit_with_every_kind_of_adapter(options, checkpointing):
    module = adapted(**options)
    if checkpointing:
        module.policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compare(module)


def test_what_is_computed_again_in_backward_is_the_policy_alone():
    module = adapted("Mistral")
    module.policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    interleave_reference(module, CPU)
    assert calls(module) == [False, True, True]  # the reference, the policy, the policy again


def test_a_pass_that_needs_no_reference_runs_none():
    module = adapted("Mistral")
    interleave_reference(module, CPU)
    batch = a_batch()
    loss, _, ref_logps, *_ = module(batch, Mode.FROM_GRADIENTS, torch.ones(len(batch.seq_lengths)))
    assert loss is not None and ref_logps is None
    loss.backward()


def refused(module: PolicyWithReference) -> str:
    interleave_reference(module, CPU)
    assert module.interleaved is None
    (note,) = module.notes
    return note


def test_embeddings_of_its_own_keep_the_reference_apart():
    note = refused(adapted("Mistral", lora_modules_to_save=["embed_tokens"]))
    assert note == (
        "policy and reference take a forward pass each: the adapter has weights outside the layers"
    )


def test_router_logits_are_recorded_of_the_policy_alone():
    module = adapted("Mixtral", coef=0.1)
    assert "router_aux_loss_coef" in refused(module)


def scaled_between(layers: Any) -> None:
    """A model that does something between its layers."""
    layers[0].register_forward_hook(lambda module, args, output: 1.5 * output)


def shared_across(layers: Any) -> None:
    """A model in which a layer uses what one before it left behind."""
    kept: list[Tensor] = []
    layers[0].mlp.register_forward_hook(lambda module, args, output: kept.append(output))
    layers[1].mlp.register_forward_hook(lambda module, args, output: output + kept[-1])


def called_by_keyword(layers: Any) -> None:
    """A model that names the hidden states."""

    class ByKeyword(type(layers[0])):
        def __call__(self, hidden_states: Tensor, **others: Any) -> Any:
            return super().__call__(hidden_states=hidden_states, **others)

    for layer in layers:
        layer.__class__ = ByKeyword


@pytest.mark.parametrize("habit", [scaled_between, shared_across, called_by_keyword])
def test_a_model_that_does_more_than_run_its_layers_takes_two_passes(habit):
    """Found although the adapter is fresh, so that policy and reference are still the same."""
    module = adapted("Mistral", trained=False)
    habit(module.policy.model.layers)
    assert "MistralForCausalLM does more than run its layers" in refused(module)


def test_a_failure_on_the_way_leaves_the_model_as_it_was():
    module = adapted("Mistral", frozen_copy=True)
    interleave_reference(module, CPU)

    def state() -> Any:
        switches = [(m._disable_adapters, m._active_adapter) for m in lora.adapted_layers(module)]
        return (
            switches,
            [p.requires_grad for p in module.parameters()],
            [name for name, m in module.named_modules() if "forward" in vars(m)],
        )

    want, before = outcome(module), state()
    last: Any = module.policy.model.layers[-1]
    for gradients in (False, True):  # in the reference's part, in the policy's

        def fail(*_: Any, at: bool = gradients) -> None:
            if torch.is_grad_enabled() == at:
                raise RuntimeError("in the middle")

        handle = last.mlp.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            module(a_batch())
        handle.remove()
        assert state() == before
    assert all(torch.equal(value, want[name]) for name, value in outcome(module).items())


def test_a_forward_that_was_replaced_before_is_used_and_stays():
    """As Liger and selective recomputation replace it, on the instance."""
    module, used = adapted("Mistral"), []
    layer: Any = module.policy.model.layers[0]
    plain = outcome(module)
    original = layer.forward

    def replaced(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        used.append(torch.is_grad_enabled())
        return 1.5 * original(hidden, *args, **kwargs)

    layer.forward = replaced
    want = outcome(module)
    assert not torch.equal(want["logps"], plain["logps"])
    interleave_reference(module, CPU)
    assert module.interleaved is not None
    used.clear()
    got = outcome(module)
    assert used == [False, True] and vars(layer)["forward"] is replaced
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert not any("forward" in vars(other) for other in module.policy.model.layers[1:])
