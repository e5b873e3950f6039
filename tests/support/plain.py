"""Steps of the real engine, and the padded forward of plain PyTorch that they are compared with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import relative_error

from madpo.trainer.batches.steps import plan_step, step_rules
from madpo.trainer.config.schema import Config
from madpo.trainer.data.order import DataOrder
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.data.training_data import load_data
from madpo.trainer.metrics import Meter
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.objectives.base import BatchState, Item
from madpo.trainer.objectives.scores import SequenceScores
from madpo.trainer.reference.cached import with_reference
from madpo.trainer.stages.start_engine import start_engine
from madpo.trainer.step import train_step


def zero3_steps(shard, config: Config, steps: int) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """(loss, full gradients of the policy) of every step."""
    from deepspeed.utils import safe_get_full_grad

    tokenizer = load_tokenizer(config.model)
    data, _ = with_reference(config, load_data(config, tokenizer, True), tokenizer, shard, training=True)
    groups = data.train
    assert groups is not None
    engine = start_engine(config, tokenizer, training=True)
    order = DataOrder(len(groups), config.seed)
    rules = step_rules(config, engine.module)
    named = engine.module.policy.named_parameters()
    names = {name: parameter for name, parameter in named if parameter.requires_grad}
    gradients: dict[str, torch.Tensor] = {}
    engine_step = engine.step

    def step_and_keep_gradients(learning_rate: float) -> bool:
        for name, parameter in names.items():
            gradient = safe_get_full_grad(parameter)
            assert gradient is not None
            gradients[name] = gradient.clone()
        return engine_step(learning_rate)

    engine.step = step_and_keep_gradients
    out = []
    memory: dict[str, list[float]] = {}
    for step in range(steps):
        meter = Meter()
        size = config.train.global_batch_size
        indices = order.take(step * size, size)
        plan = plan_step(groups, indices, rules, shard)
        state = BatchState(memory, (config.seed, step))
        memory = train_step(engine, plan, config.optim.lr, meter, state).memory
        out.append((meter.reduce()["loss"], dict(gradients)))
    engine.release()
    return out if shard.is_main else []


def plain_optimizer(model: Any, config: Config) -> torch.optim.AdamW:
    """AdamW as the engine has it: weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    decay = config.optim.weight_decay
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.optim.lr)


def padded_logps(model: Any, batch: list[TokenGroup], tokens: bool = False) -> torch.Tensor:
    """(sequences,) log-probs of every completion, prompt repeated, right-padded, all logits; or of every
    scored token, one completion after another."""
    rows = [(group.prompt, completion) for group in batch for completion in group.completions]
    masks = [mask for group in batch for mask in group.whole_masks]
    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), -100)
    for row, ((prompt, completion), mask) in enumerate(zip(rows, masks, strict=True)):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion).where(
            torch.tensor(mask), torch.tensor(-100)
        )
    present = torch.arange(longest) < torch.tensor([len(p) + len(c) for p, c in rows])[:, None]
    logits = model(input_ids=ids, attention_mask=present.long(), use_cache=False).logits[:, :-1]
    targets = labels[:, 1:]
    logps = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return logps[targets != -100] if tokens else torch.where(targets == -100, 0.0, logps).sum(1)


def plain_steps(config: Config, steps: int) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Padded Hugging Face forward of the whole step at once, the objective, autograd, AdamW."""
    from transformers import AutoModelForCausalLM

    entry, model = config.bound_objective, config.model
    assert model.model_name_or_path
    policy: Any = AutoModelForCausalLM.from_pretrained(model.model_name_or_path)
    reference: Any = AutoModelForCausalLM.from_pretrained(
        str(model.ref_model_name_or_path or model.model_name_or_path)
    )
    groups = load_data(config, load_tokenizer(model), training=True).train
    assert groups is not None
    order, out, size = DataOrder(len(groups), config.seed), [], config.train.global_batch_size
    memory: dict[str, list[float]] = {}
    optimizer = plain_optimizer(policy, config)
    for step in range(steps):
        batch = [groups[index] for index in order.take(step * size, size)]
        with torch.no_grad():
            ref_logps = padded_logps(reference, batch).double() if entry.needs_reference else None
        lengths = torch.tensor([count for group in batch for count in group.scored])
        labels = torch.tensor([label for group in batch for label in group.labels])
        scores: Any = SequenceScores(padded_logps(policy, batch).double(), ref_logps, lengths, labels)
        if entry.item is Item.EDGE:
            chosen = torch.arange(0, 2 * size, 2)
            margins = torch.tensor([group.edges[0][2] for group in batch], dtype=torch.float64)
            scores = scores.edges(chosen, chosen + 1, margins)
        outcome = entry.outcome(scores, BatchState(memory, (config.seed, step)))
        memory = outcome.memory
        items = size if entry.item is Item.EDGE else int((labels != 0).sum())
        loss = (outcome.losses * _weights(batch, entry.item)).sum() / items
        optimizer.zero_grad()
        loss.backward()
        out.append((loss.item(), {n: p.grad.clone() for n, p in policy.named_parameters()}))
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.optim.max_grad_norm)
        optimizer.step()
    return out


def _weights(batch: list[Any], item: Item) -> torch.Tensor:
    """(items,) the data's own factors on the losses of these groups."""
    weights: list[float] = []
    for group in batch:
        if item is Item.EDGE:
            weights += group.edge_weights or [1.0] * len(group.edges)
        else:
            weights += group.completion_weights or [1.0] * len(group.completions)
    return torch.tensor(weights, dtype=torch.float64)


def compare(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Losses and whole gradients of every step agree."""
    for step, ((loss, gradients), (true_loss, true_gradients)) in enumerate(zip(got, want, strict=True)):
        assert loss == pytest.approx(true_loss, rel=tolerance), f"loss of step {step}"
        flat = [
            torch.cat([g[n].flatten() for n in sorted(true_gradients)]) for g in (gradients, true_gradients)
        ]
        assert relative_error(*flat) < tolerance, f"gradient of step {step}"
