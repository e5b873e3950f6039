"""ZeRO-3 on gloo ranks against plain PyTorch, and against itself for other world sizes and splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import make_config, run_ranks, save_model, write_pairs
from kernel_cases import relative_error
from plain import compare, padded_logps, plain_optimizer, zero3_steps

from madpo.trainer.batches.steps import StepRules, plan_step
from madpo.trainer.config.schema import Config
from madpo.trainer.data.order import DataOrder
from madpo.trainer.data.training_data import load_data
from madpo.trainer.metrics import Meter
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.objectives.base import BatchState, Item, MarginWeight
from madpo.trainer.stages.start_engine import start_engine
from madpo.trainer.step import train_step

pytestmark = pytest.mark.ranks

BATCH = 7  # odd, so that ranks and micro-batches hold different numbers of pairs


def config_of(folder: Path, tokenizer: Path, tied: bool) -> Config:
    model = save_model(folder / "policy", tokenizer, seed=1, tied=tied)
    reference = save_model(folder / "reference", tokenizer, seed=2, tied=tied)
    return make_config(
        folder,
        {
            "model": {"model_name_or_path": str(model), "ref_model_name_or_path": str(reference)},
            "data": {"dataset_name": str(write_pairs(folder / "pairs.jsonl", 40))},
            "objective": {"loss_type": "madpo", "tau": 2.0},
            "optim": {"lr": 1e-3, "max_grad_norm": 1.0, "weight_decay": 0.01},
            "train": {"global_batch_size": BATCH},
        },
    )


class Run(NamedTuple):
    config: Config
    plain: list[Any]  # five steps in plain PyTorch
    ranks: list[Any]  # and on two ranks


@pytest.fixture(scope="module")
def untied(tmp_path_factory, tokenizer_folder) -> Run:
    """With the checks of the models at its start."""
    config = config_of(tmp_path_factory.mktemp("untied"), tokenizer_folder, tied=False)
    return Run(config, plain_steps(config, 5), run_ranks(2, zero3_steps, config, 5, checks=True)[0])


@pytest.fixture(scope="module")
def tied(tmp_path_factory, tokenizer_folder) -> Run:
    config = config_of(tmp_path_factory.mktemp("tied"), tokenizer_folder, tied=True)
    return Run(config, plain_steps(config, 5), run_ranks(2, zero3_steps, config, 5)[0])


@pytest.fixture
def config(untied) -> Config:
    return untied.config


HEADS = pytest.mark.parametrize("name", ["untied", "tied"])
"""Whether the head's weights are those of the embeddings."""


def plain_steps(config: Config, steps: int) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Steps in ordinary PyTorch: padded Hugging Face forward, log-softmax, autograd, AdamW."""
    from transformers import AutoModelForCausalLM

    assert config.model.model_name_or_path and config.model.ref_model_name_or_path
    policy: Any = AutoModelForCausalLM.from_pretrained(config.model.model_name_or_path)
    reference: Any = AutoModelForCausalLM.from_pretrained(config.model.ref_model_name_or_path)
    groups = load_data(config, load_tokenizer(config.model), training=True).train
    assert groups is not None
    order = DataOrder(len(groups), config.seed)
    optimizer = plain_optimizer(policy, config)
    out = []
    for step in range(steps):
        batch = [groups[index] for index in order.take(step * BATCH, BATCH)]
        logps = padded_logps(policy, batch).view(-1, 2)
        with torch.no_grad():
            ref_logps = padded_logps(reference, batch).view(-1, 2)
        ratios = logps - ref_logps
        margins = torch.tensor([group.edges[0][2] for group in batch])
        weight = MarginWeight(4, 0.25, 1, config.objective.tau)(margins)
        loss = (-F.logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])) * weight).mean()
        optimizer.zero_grad()
        loss.backward()
        out.append((loss.item(), {n: p.grad.clone() for n, p in policy.named_parameters()}))
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.optim.max_grad_norm)
        optimizer.step()
    return out


@HEADS
def test_two_zero3_ranks_equal_plain_pytorch(name, request):
    run: Run = request.getfixturevalue(name)
    losses = [loss for loss, _ in run.plain]
    assert losses[0] != pytest.approx(losses[-1], rel=1e-2), "the run must move for this to prove anything"
    compare(run.ranks, run.plain)


@pytest.mark.parametrize(
    "changes",
    [{"model_type": "phi"}, {"model_type": "cohere", "logit_scale": 0.25}],
    ids=["bias", "scaled-logits"],
)
def test_heads_with_a_bias_or_a_scale_under_zero3(changes, tmp_path, tokenizer_folder):
    """The bias is a parameter of its own, shared between the model and the head, and is trained."""
    names = {}
    for role, seed in (("model_name_or_path", 1), ("ref_model_name_or_path", 2)):
        names[role] = str(save_model(tmp_path / role, tokenizer_folder, seed, **changes))
    config = make_config(
        tmp_path,
        {
            "model": names,
            "data": {"dataset_name": str(write_pairs(tmp_path / "pairs.jsonl", 40))},
            "objective": {"loss_type": "madpo", "tau": 2.0},
            "train": {"global_batch_size": BATCH},
        },
    )
    want = plain_steps(config, 2)
    if changes["model_type"] == "phi":
        assert want[0][1]["lm_head.bias"].any()
    compare(run_ranks(2, zero3_steps, config, 2)[0], want)


@pytest.mark.parametrize(
    "name, gib",
    [pytest.param("untied", 2.0, marks=pytest.mark.slow), ("tied", 1e-5)],
    ids=["one-chunk", "chunks-and-blocks-tied"],
)
def test_the_triton_head_under_zero3_equals_plain_pytorch(name, gib, request):
    """The kernels, interpreted, inside two real ZeRO-3 ranks."""
    run: Run = request.getfixturevalue(name)
    update = {"head_impl": "triton", "head_gib": gib}
    triton = run.config.model_copy(update={"train": run.config.train.model_copy(update=update)})
    compare(run_ranks(2, zero3_steps, triton, 1)[0], run.plain[:1])


@HEADS
def test_first_gradients_of_every_parameter_equal_plain_pytorch(name, request):
    run: Run = request.getfixturevalue(name)
    want, got = run.plain[0][1], run.ranks[0][1]
    assert got.keys() == want.keys()
    for name in want:
        assert relative_error(got[name], want[name]) < 1e-5, name


@pytest.fixture(scope="module")
def at_once(untied) -> Any:
    """Two steps of one rank, each in one micro-batch."""
    return run_ranks(1, zero3_steps, with_budget(untied.config, 4096), 2)[0]


@pytest.mark.parametrize("world_size, budget", [(1, 128), (2, 200), (4, 128)])
def test_same_batch_same_loss_and_gradients(config, at_once, world_size, budget):
    """For any number of ranks and any split into micro-batches."""
    compare(run_ranks(world_size, zero3_steps, with_budget(config, budget), 2)[0], at_once)


def test_ranks_without_a_group_stay_in_step_and_count_for_nothing(config):
    few = config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": 3})})
    want = run_ranks(1, few_steps, few)[0]
    results = run_ranks(4, few_steps, few)
    assert sum(dummies for _, dummies in results) == 2
    compare(results[0][0], want[0])


def few_steps(shard, config: Config) -> tuple[Any, int]:
    """Two steps of three groups, and how many dummy batches this rank ran."""
    groups = load_data(config, load_tokenizer(config.model), training=True).train
    assert groups is not None
    dummies = 0
    for step in range(2):
        indices = DataOrder(len(groups), config.seed).take(step * 3, 3)
        batches = plan_step(groups, indices, StepRules(Item.EDGE, 256), shard).batches
        dummies += sum(batch.is_dummy for batch in batches)
    return zero3_steps(shard, config, 2), dummies


def with_budget(config: Config, budget: int) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_tokens": budget})})


def first_loss(shard, config: Config) -> dict[str, float]:
    tokenizer = load_tokenizer(config.model)
    groups = load_data(config, tokenizer, training=True).train
    assert groups is not None
    engine: Any = start_engine(config, tokenizer, training=True)
    meter = Meter()
    step = plan_step(groups, np.arange(BATCH), StepRules(Item.EDGE, 256), shard)
    train_step(engine, step, 1e-3, meter, BatchState())
    engine.release()
    return meter.reduce()


@pytest.mark.parametrize(
    "name, bf16, checkpointing",
    [("untied", False, False), ("tied", True, False), ("tied", False, True), ("untied", True, True)],
)
def test_step_zero_with_policy_as_reference(name, bf16, checkpointing, request):
    """The margin is exactly 0 and the loss ln 2."""
    config = request.getfixturevalue(name).config
    model = config.model.model_copy(
        update={"ref_model_name_or_path": None, "gradient_checkpointing": checkpointing}
    )
    start = config.model_copy(
        update={
            "model": model,
            "objective": config.objective.model_copy(update={"margin_scale": 1e-9}),
            "train": config.train.model_copy(update={"bf16": bf16}),
        }
    )
    record = run_ranks(2, first_loss, start)[0]
    assert record["rewards/margins"] == 0.0
    assert record["kl"] == 0.0
    assert record["rewards/accuracies"] == 0.0
    assert record["loss"] == pytest.approx(np.log(2), abs=1e-8)


def test_activation_checkpointing_changes_nothing(untied):
    model = untied.config.model.model_copy(update={"gradient_checkpointing": True})
    got = run_ranks(2, zero3_steps, untied.config.model_copy(update={"model": model}), 2)[0]
    compare(got, untied.ranks[:2], tolerance=1e-6)


def test_no_reference_parameter_is_trained(config):
    module = run_ranks(1, trainable_names, config)[0]
    assert module and all(name.startswith("policy.") for name in module)


def trainable_names(shard, config: Config) -> list[str]:
    engine: Any = start_engine(config, load_tokenizer(config.model), training=True)
    names = [name for name, p in engine.module.named_parameters() if p.requires_grad]
    engine.release()
    return names
