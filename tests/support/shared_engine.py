"""Many losses under one engine: a start takes seconds, a step of tiny models a fraction of one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from facts import Facts
from odd_settings import Settings, numeric_gradients, opinion

from madpo.trainer.batches.steps import plan_step, step_rules
from madpo.trainer.config.schema import Config
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.data.training_data import load_data
from madpo.trainer.loop import evaluate
from madpo.trainer.metrics import Meter
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.objectives.base import BatchState, Item
from madpo.trainer.stages.start_engine import start_engine
from madpo.trainer.step import train_step

Gradients = dict[str, torch.Tensor]
MEMORY = {"moments": [0.4, 2.3]}
"""What an evaluation is handed."""


def steps_of(config: Config) -> int:
    """What remembers is seen remembering."""
    return 2 if config.bound_objective.needs_batch else 1


def groups_of(config: Config) -> Any:
    groups = load_data(config, load_tokenizer(config.model), training=True).train
    assert groups is not None
    return groups


def every_loss(shard: Any, configs: list[Config], evaluated: Config | None = None) -> Any:
    """For each config its (record, gradients) of every step, by engines that do not move: one with the
    reference of those that need it, and one without. Then the record of an evaluation by the first."""
    out: dict[int, Any] = {}
    record: dict[str, float] = {}
    for with_reference in (True, False):
        mine = {
            index: config
            for index, config in enumerate(configs)
            if config.bound_objective.needs_reference == with_reference
        }
        if not mine:
            continue
        first = next(iter(mine.values()))
        engine = start_engine(first, load_tokenizer(first.model), training=True)
        gradients = _kept_gradients(engine)
        for index, config in mine.items():
            out[index] = _steps(engine, gradients, config, shard)
        if with_reference and evaluated is not None:
            record = evaluate(evaluated, engine, _have(engine, evaluated), shard, MEMORY).record
        engine.release()
    return ([out[index] for index in range(len(configs))], record) if shard.is_main else None


def _have(engine: Any, config: Config) -> Any:
    """Give the engine's head this config's loss; the groups of its data."""
    engine.module.head.objective = config.bound_objective
    return groups_of(config)


def _kept_gradients(engine: Any) -> Gradients:
    """The full gradients of every step, of which the engine forgets them."""
    from deepspeed.utils import safe_get_full_grad

    named, gradients, step = dict(engine.module.policy.named_parameters()), Gradients(), engine.step

    def step_and_keep_gradients(learning_rate: float) -> None:
        for name, parameter in named.items():
            gradient = safe_get_full_grad(parameter)
            assert gradient is not None
            gradients[name] = gradient.clone()
        step(learning_rate)

    engine.step = step_and_keep_gradients
    return gradients


def _steps(engine: Any, gradients: Gradients, config: Config, shard: Any) -> list[Any]:
    """(record, gradients) of steps of learning rate 0."""
    groups, size = _have(engine, config), config.train.global_batch_size
    rules, memory, out = step_rules(config, engine.module), dict[str, list[float]](), []
    for step in range(steps_of(config)):
        plan = plan_step(groups, np.arange(step * size, (step + 1) * size), rules, shard)
        meter, state = Meter(), BatchState(memory, (config.seed, step))
        memory = train_step(engine, plan, 0.0, meter, state).memory
        out.append((meter.reduce(), dict(gradients)))
    return out


class Plain:
    """Policy and reference in plain transformers, each completion behind its prompt by itself."""

    def __init__(self, config: Config) -> None:
        from transformers import AutoModelForCausalLM

        assert config.model.model_name_or_path
        names = config.model.model_name_or_path, str(config.model.ref_model_name_or_path)
        self.policy, self.reference = (AutoModelForCausalLM.from_pretrained(name) for name in names)

    def facts(self, groups: list[TokenGroup]) -> tuple[Facts, torch.Tensor, torch.Tensor]:
        """What is known of the groups, and what of it has gradients: each token's log-prob and its KL."""
        rows = [(group.prompt, completion) for group in groups for completion in group.completions]

        def distributions(model: Any) -> torch.Tensor:
            parts = []
            for prompt, completion in rows:
                logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
                parts.append(logits[len(prompt) - 1 : -1].double().log_softmax(-1))
            return torch.cat(parts)

        policy = distributions(self.policy)
        with torch.no_grad():
            reference = distributions(self.reference)
        targets = torch.tensor([token for _, completion in rows for token in completion])[:, None]
        tokens, ref_tokens = (of.gather(1, targets)[:, 0] for of in (policy, reference))
        kl = (reference.exp() * (reference - policy)).sum(1)
        firsts = np.cumsum([0, *(len(group.completions) for group in groups)])
        edges = [
            (first + won, first + lost, margin)
            for first, group in zip(firsts, groups, strict=False)
            for won, lost, margin in group.edges
        ]
        won, lost, margins = np.array(edges).T if edges else np.empty((3, 0))
        labels = [label for group in groups for label in group.labels or [0] * len(group.completions)]
        x = Facts(
            tokens.detach().numpy(),
            ref_tokens.numpy(),
            np.array([len(completion) for _, completion in rows]),
            won.astype(int),
            lost.astype(int),
            margins,
            np.array(labels),
            (2 * policy.detach()).logsumexp(1).numpy(),
            kl.detach().numpy(),
        )
        return x, tokens, kl

    def gradients(self, loss: torch.Tensor) -> Gradients:
        names, parameters = zip(*self.policy.named_parameters(), strict=True)
        found = torch.autograd.grad(loss, parameters, retain_graph=True)
        return dict(zip(names, found, strict=True))


def items_of(config: Config, x: Facts) -> int:
    counts = {Item.EDGE: len(x.chosen), Item.SEQUENCE: int((x.labels != 0).sum()), Item.TOKEN: len(x.tokens)}
    return counts[config.bound_objective.item]


def loss_and_gradients(
    config: Config, settings: Settings, plain: Plain, known: tuple[Facts, torch.Tensor, torch.Tensor]
) -> tuple[float, Gradients, dict[str, list[float]]]:
    """The mean over items by the second opinion, its gradient, and what it remembers."""
    name, (x, tokens, kl) = config.objective.loss_type, known
    losses, memory = opinion(name, x, settings)
    of_tokens, of_kl = (
        torch.from_numpy(gradient / items_of(config, x)) for gradient in numeric_gradients(name, x, settings)
    )
    stand_in = (tokens * of_tokens).sum() + (kl * of_kl).sum()
    return losses.sum() / items_of(config, x), plain.gradients(stand_in), memory
