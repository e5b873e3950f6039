"""Steps of the real engine, and the padded forward of plain PyTorch that they are compared with."""

from __future__ import annotations

from typing import Any

import torch

from madpo.trainer.config import Config
from madpo.trainer.data.loader import plan_step, step_rules
from madpo.trainer.data.order import DataOrder
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.engine import train_step
from madpo.trainer.metrics import Meter
from madpo.trainer.model.load import load_tokenizer
from madpo.trainer.model.prefix_attention import shares_rows
from madpo.trainer.objectives.base import BatchState
from madpo.trainer.stages.setup import load_data, start_engine


def zero3_steps(shard, config: Config, steps: int) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """(loss, full gradients of the policy) of every step."""
    from deepspeed.utils import safe_get_full_grad

    tokenizer = load_tokenizer(config.model)
    groups = load_data(config, tokenizer, training=True).train
    assert groups is not None
    engine = start_engine(config, tokenizer, training=True)
    order = DataOrder(len(groups), config.seed)
    rules = step_rules(config, shares_rows(engine.module.policy))
    named = engine.module.policy.named_parameters()
    names = {name: parameter for name, parameter in named if parameter.requires_grad}
    gradients: dict[str, torch.Tensor] = {}
    engine_step = engine.step

    def step_and_keep_gradients() -> None:
        for name, parameter in names.items():
            gradient = safe_get_full_grad(parameter)
            assert gradient is not None
            gradients[name] = gradient.clone()
        engine_step()

    engine.step = step_and_keep_gradients
    out = []
    memory: dict[str, list[float]] = {}
    for step in range(steps):
        meter = Meter()
        size = config.train.global_batch_size
        indices = order.take(step * size, size)
        plan = plan_step(groups, indices, rules, shard)
        state = BatchState(memory, (config.seed, step))
        memory = train_step(engine, plan, config.optim.lr, meter, state)
        out.append((meter.reduce()["loss"], dict(gradients)))
    engine.destroy()
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
    token, one completion after another."""
    rows = [(group.prompt, completion) for group in batch for completion in group.completions]
    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), -100)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
    present = torch.arange(longest) < torch.tensor([len(p) + len(c) for p, c in rows])[:, None]
    logits = model(input_ids=ids, attention_mask=present.long()).logits[:, :-1]
    targets = labels[:, 1:]
    logps = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return logps[targets != -100] if tokens else torch.where(targets == -100, 0.0, logps).sum(1)
