"""Activations that are computed again or wait in host memory: the same gradients to the bit, less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from activation_cases import WAYS, forward, prepared
from harness import make_config, run_ranks, save_model, write_pairs
from lora_cases import changed
from plain import zero3_steps
from torch import Tensor

from madpo.trainer.config.schema import Config
from madpo.trainer.model import offload
from madpo.trainer.model.offload import HostCopy, LayerActivations, SavedHandle, offload_layers
from madpo.trainer.model.recompute import checkpoint_layers


def gradients(model: Any) -> dict[str, Tensor]:
    for _ in range(2):  # the second time, whatever the first one left behind would be found
        model.zero_grad()
        forward(model)().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module", params=["Llama 3", "Qwen2.5", "Gemma 2", "Qwen3-MoE", "Phi"])
def plain(request) -> tuple[str, dict[str, Tensor]]:
    """A family, and its gradients with all activations kept."""
    return request.param, gradients(prepared(request.param, {}))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_gradients_are_the_same_to_the_bit(plain, way):
    family, want = plain
    got = gradients(prepared(family, way))
    assert got.keys() == want.keys() and any(g.any() for g in want.values())
    for name in want:
        assert torch.equal(got[name], want[name]), name


class Seen:
    """What was offloaded: the shape of each tensor saved, and a host copy for each piece of memory."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.copies: list[HostCopy] = []

    def __enter__(self) -> Seen:
        self.add = LayerActivations.add

        def add(activations: LayerActivations, tensor: Tensor) -> SavedHandle:
            handle = self.add(activations, tensor)
            self.shapes.append(tuple(tensor.shape))
            if handle.copy.uses == 1:
                self.copies.append(handle.copy)
            return handle

        setattr(LayerActivations, "add", add)  # noqa: B010
        return self

    def __exit__(self, *error: Any) -> None:
        LayerActivations.add = self.add


def test_what_is_offloaded():
    """The bytes of all layers but the last: each piece of memory once, however many operations saved it; no
    weight, and nothing that all layers share."""
    model = prepared("Llama 3", WAYS["offloaded"], num_hidden_layers=3)
    weights = {tuple(p.shape) for p in model.parameters()}
    with Seen() as seen:
        forward(model)().backward()
    assert len(seen.shapes) > len(seen.copies) and len(seen.copies) % 2 == 0 and seen.copies
    assert not any(shape in weights or shape[::-1] in weights for shape in seen.shapes)
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    assert not any(shape[0] == 1 and shape[2:] == (head_dim,) for shape in seen.shapes), "rotary embedding"
    assert all(copy.on_device is None for copy in seen.copies), "all have been handed out and let go"


def test_with_checkpointing_only_inputs_are_offloaded():
    model = prepared("Llama 3", WAYS["full-offloaded"], num_hidden_layers=3)
    with Seen() as seen:
        forward(model)().backward()
    assert [shape[2:] for shape in seen.shapes] == [(model.config.hidden_size,)] * 2


def test_a_graph_can_be_run_backward_twice():
    model = prepared("Llama 3", WAYS["offloaded"])
    loss = forward(model)()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.model.parameters()]
    loss.backward()
    for gradient, parameter in zip(once, model.model.parameters(), strict=True):
        assert torch.equal(parameter.grad, 2 * gradient)


def test_small_tensors_stay():
    model = prepared("Llama 3", {})
    offload_layers(model)
    with Seen() as seen:
        forward(model)().backward()
    assert not seen.copies


def test_without_gradients_nothing_is_copied():
    model = prepared("Llama 3", {"activation_offloading": True})
    with Seen() as seen, torch.no_grad():
        forward(model)()
    assert not seen.copies


def test_layers_that_are_not_known_are_refused(monkeypatch):
    model = prepared("Llama 3", {})
    monkeypatch.setattr(offload, "GradientCheckpointingLayer", torch.nn.Conv1d)
    with pytest.raises(ValueError, match=r"model\.activation_offloading: .* LlamaForCausalLM"):
        offload_layers(model)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match=r"model\.gradient_checkpointing: LlamaForCausalLM has none"):
        checkpoint_layers(model, selective=False)


@pytest.fixture
def config(tmp_path, tokenizer_folder) -> Config:
    """Qwen 2, whose biases DeepSpeed adds in place."""
    changes = {"model_type": "qwen2", "num_hidden_layers": 3}
    names = {}
    for role, seed in (("model_name_or_path", 1), ("ref_model_name_or_path", 2)):
        names[role] = str(save_model(tmp_path / role, tokenizer_folder, seed, tied=True, **changes))
    return make_config(
        tmp_path,
        {
            "model": names,
            "data": {"dataset_name": str(write_pairs(tmp_path / "pairs.jsonl", 14))},
            "objective": {"loss_type": "madpo", "tau": 2.0},
            "train": {"global_batch_size": 7},
        },
    )


def all_offloaded(shard, config: Config, steps: int) -> Any:
    """Run zero3_steps with tensors of all sizes offloaded; and the shapes that were."""
    offload_layers.__defaults__ = (0,)
    with Seen() as seen:
        out = zero3_steps(shard, config, steps)
    return out, set(seen.shapes)


@pytest.mark.ranks
@pytest.mark.parametrize("peft", [{"lora_r": 4}, None], ids=["adapter", "whole"])
def test_zero3_gradients_are_the_same_to_the_bit(config, peft):
    """On two ranks, and no gathered weight is copied to host memory."""
    ways = ["selective-offloaded", "offloaded"]
    if peft:
        config = changed(config, peft=peft, model={"ref_model_name_or_path": None})
        ways = ["selective"]
    want = run_ranks(2, zero3_steps, config, 2)[0]
    weights = {tuple(value.shape) for value in want[0][1].values()}  # of the adapter, where there is one
    for way in ways:
        got, shapes = run_ranks(2, all_offloaded, changed(config, model=WAYS[way]), 2)[0]
        for (loss, gradients), (true_loss, true_gradients) in zip(got, want, strict=True):
            assert loss == true_loss and gradients.keys() == true_gradients.keys(), way
            for name in gradients:
                assert torch.equal(gradients[name], true_gradients[name]), (way, name)
        assert bool(shapes) is ("offloaded" in way)
        assert not any(shape in weights or shape[::-1] in weights for shape in shapes), way
