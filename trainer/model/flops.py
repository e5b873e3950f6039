"""Floating-point operations of a packed step, read off the model and its config.

A multiplication and an addition are two operations. A token takes 2P operations for a matrix of P weights in
forward, 2P for the gradient of its input and 2P for that of the weights, where these are formed: not for
frozen weights, and not for inputs with no trained weight before them. An attention pair, a query and a key
that it attends to, takes 2 operations per head and dimension for the score and 2 for the value, and twice
that backward. An expert counts as often as tokens are sent to it. Look-ups, norms, rotations, softmax and
the optimiser are left out, as is usual, and so are attention scores that a kernel forms only to mask them.

Source: Chowdhery et al. 2022 (arXiv 2204.02311), appendix B, for FLOPs of the model against those of the
hardware.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from madpo.trainer.batches.cost import Cost, StepCost
from madpo.trainer.model.backbone import backbone
from madpo.trainer.model.families import experts_per_token, layer_configs, num_experts
from madpo.trainer.model.lora import in_use
from madpo.trainer.scoring_module import ScoringModule
from madpo.trainer.zero3.parameters import real_shape, real_size


@dataclass(frozen=True)
class Passes:
    """The costs of a backbone."""

    forward: Cost = field(default_factory=Cost)
    backward: Cost = field(default_factory=Cost)
    layers: Cost = field(default_factory=Cost)  # forward of the layers that gradients go through
    trains: bool = False  # whether any gradient reaches it


def step_cost(module: ScoringModule, training: bool = True) -> StepCost:
    """The cost of a step's micro-batches in training, or of the same micro-batches in evaluation."""
    policy, head = passes(module.policy), _head_weight(module)
    forward = policy.forward + Cost(per_row=2 * head)
    forward, again, again_in_parts = forward + _reference_cost(module), Cost(), Cost()
    if not training:
        return StepCost(forward)
    sides = policy.trains + module.head.weight.requires_grad
    backward = policy.backward + Cost(per_row=2 * head * sides)
    if module.head.objective.needs_batch:  # a first pass, without gradients, scores all completions
        again, again_in_parts = Cost(per_row=2 * head), policy.forward
    if module.repeats_layers:
        again += policy.layers
    return StepCost(forward, backward, again, again_in_parts)


def passes(model: PreTrainedModel) -> Passes:
    """FLOPs of the backbone's forward and backward, with the adapter that is active now."""
    share = _share_of_experts(model)
    attention, idle = iter(_attention_costs(model.config)), _idle_adapters(model)
    out = Passes()
    trains = False
    for block, is_layer in _blocks(backbone(model)):
        weights = list(_weights(block, idle, share))
        per_pair = next(attention, {}) if is_layer else {}
        trains = trains or any(parameter.requires_grad for parameter in block.parameters())
        forward = Cost(2 * sum(size for size, _ in weights), 0, per_pair)
        trained = Cost(2 * sum(size for size, is_trained in weights if is_trained))
        backward = forward + trained + Cost(per_attention_pair=per_pair) if trains else Cost()
        layers = forward if trains and is_layer else Cost()
        out = Passes(out.forward + forward, out.backward + backward, out.layers + layers, trains)
    return out


def _reference_cost(module: ScoringModule) -> Cost:
    reference = module.reference_scorer
    if reference is None:
        return Cost()
    with reference.state():
        return passes(reference.model).forward + Cost(per_row=2 * _numel(module.head.ref_weight))


def _head_weight(module: ScoringModule) -> int:
    """Numbers in the output layer, which scores every completion token; a reward model has none."""
    return 0 if module.head.objective.is_reward_model else _numel(module.head.weight)


def _blocks(module: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """A backbone's parts in the order in which they run, and whether each is a layer."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from ((layer, True) for layer in child)
        elif any(isinstance(grandchild, nn.ModuleList) for grandchild in child.children()):
            yield from _blocks(child)
        else:
            yield child, False


def _weights(block: nn.Module, idle: set[nn.Module], share_of_experts: float) -> Iterator[tuple[float, bool]]:
    """For each matrix, how many of its numbers a token is multiplied by, and whether they are trained."""
    for module in _running(block, idle):
        for parameter in module.parameters(recurse=False):
            shape = real_shape(parameter)
            if isinstance(module, nn.Linear) and len(shape) > 1:
                yield module.in_features * module.out_features, parameter.requires_grad  # packed if quantised
            elif len(shape) == 2:
                yield math.prod(shape), parameter.requires_grad
            elif len(shape) == 3:
                yield math.prod(shape) * share_of_experts, parameter.requires_grad


def _running(module: nn.Module, idle: set[nn.Module]) -> Iterator[nn.Module]:
    """The module and all modules in it, without embeddings, which are looked up, and idle adapters."""
    if module in idle or isinstance(module, nn.Embedding):
        return
    yield module
    for child in module.children():
        yield from _running(child, idle)


def _idle_adapters(model: PreTrainedModel) -> set[nn.Module]:
    """Adapters, and copies of whole modules, that a forward pass would not run."""
    idle = set[nn.Module]()
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    for layer in layers:
        active = [] if layer.disable_adapters else layer.active_adapters
        for child in layer.children():
            if isinstance(child, nn.ModuleDict):
                idle.update(copy for name, copy in child.items() if name not in active)
        if in_use(layer) is not layer and active:
            idle.add(layer.original_module)
    return idle


def _share_of_experts(model: PreTrainedModel) -> float:
    """The part of a layer's experts that a token is sent to; 1 where the config does not say."""
    selected, experts = experts_per_token(model), num_experts(model)
    return selected / experts if selected and experts else 1.0


def _attention_costs(config: PreTrainedConfig) -> list[dict[int | None, float]]:
    """For each layer: window -> operations of one attention pair."""
    layers = layer_configs(config)
    window = getattr(config, "sliding_window", None)
    default = "sliding_attention" if window else "full_attention"
    kinds = getattr(config, "layer_types", None) or [default] * len(layers)
    return [
        {window if kind == "sliding_attention" else None: _pair_cost(layer)}
        if getattr(layer, "num_attention_heads", None)  # Mamba has none
        else {}
        for kind, layer in zip(kinds, layers, strict=False)
    ]


def _pair_cost(layer: Any) -> float:
    heads = layer.num_attention_heads
    size = getattr(layer, "head_dim", None) or layer.hidden_size // heads
    score_dims, value_dims = (getattr(layer, name, None) or size for name in ("qk_head_dim", "v_head_dim"))
    return 2.0 * heads * (score_dims + value_dims)


def _numel(parameter: nn.Parameter | None) -> int:
    return 0 if parameter is None else real_size(parameter)
