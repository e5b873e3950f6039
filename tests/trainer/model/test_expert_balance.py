"""Mixtures of experts: the loss that keeps them in balance, and routing that differs between ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import VOCAB, tiny_model
from harness import make_config, random_groups, run_ranks, write_pairs
from kernel_cases import relative_error
from plain import padded_logps, zero3_steps
from transformers import AutoModelForCausalLM, AutoTokenizer

from madpo.trainer.batches.packing import pack
from madpo.trainer.batches.steps import plan_step, step_rules
from madpo.trainer.checkpoints.identity import identity
from madpo.trainer.config.schema import Config
from madpo.trainer.data.order import DataOrder
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.data.training_data import load_data
from madpo.trainer.dist import Shard
from madpo.trainer.model.attention import prefix_sharing
from madpo.trainer.model.expert_balance import expert_balance
from madpo.trainer.model.policy import PolicyWithReference
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.objectives.build import bind
from madpo.trainer.objectives.registry import OBJECTIVES
from madpo.trainer.stages.train import run_training

BALANCED = ("Mixtral", "Qwen2-MoE", "Qwen3-MoE", "gpt-oss")
"""Families for which transformers has the loss."""


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "activation-checkpointing"])
@pytest.mark.parametrize("family", BALANCED)
def test_the_loss_is_that_of_transformers(family, checkpointing):
    """On one completion, where nothing is shared; value and gradients."""
    prefix_sharing.register()
    ours, theirs = tiny_model(family, prefix_sharing.NAMES["sdpa"]), tiny_model(family, "eager")
    if checkpointing:
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    (group,) = random_groups(1, completions=1, vocab=VOCAB)
    entry = OBJECTIVES["nll"]
    module = PolicyWithReference(ours, None, bind(entry.params()), 2**20, balance=expert_balance(ours, 0.5))
    module.train()
    ids = torch.tensor([group.prompt + group.completions[0]])
    batch = pack([group], scale=0.0, token_scale=1 / ids.shape[1])
    want = theirs(input_ids=ids, output_router_logits=True, use_cache=False).aux_loss
    loss, *_ = module(batch)
    assert loss is not None
    assert module.stats["aux_loss"].item() == pytest.approx(want.item(), rel=1e-6)
    assert loss.item() == pytest.approx(0.5 * want.item(), rel=1e-6)
    loss.backward()
    (0.5 * want).backward()
    truth = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("gate" in name or "router" in name for name in truth)
    for name, parameter in ours.named_parameters():
        if name in truth:
            assert relative_error(parameter.grad, truth[name]) < 1e-5, name


def config_of(family: str, tmp_path: Path, tokenizer: Path, coef: float, **changes: Any) -> Config:
    start = tmp_path / "start"
    tiny_model(family, "eager", vocab_size=311, **changes).save_pretrained(start)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(start)
    return make_config(
        tmp_path,
        {
            "model": {"model_name_or_path": str(start), "router_aux_loss_coef": coef},
            "data": {"dataset_name": str(write_pairs(tmp_path / "pairs.jsonl", 12))},
            "train": {"global_batch_size": 5, "micro_batch_tokens": 128},
        },
    )


def packed_router_logits(model: Any, group: TokenGroup) -> list[torch.Tensor]:
    """(N, experts) of every mixture: the prompt once, then the completions, each scored alone."""
    rows: list[list[torch.Tensor]] = []
    for index, completion in enumerate(group.completions):
        ids = torch.tensor([group.prompt + completion])
        logits = model(input_ids=ids, output_router_logits=True, use_cache=False).router_logits
        first = 0 if index == 0 else len(group.prompt)
        rows.append([layer.view(ids.shape[1], -1)[first:] for layer in logits])
    return [torch.cat(layers) for layers in zip(*rows, strict=True)]


def plain_step(config: Config, world_size: int) -> tuple[float, dict[str, torch.Tensor]]:
    """The experts' loss, and the gradients of it and the preferences', by the step's own micro-batches."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    model: Any = AutoModelForCausalLM.from_pretrained(str(config.model.model_name_or_path))
    groups = load_data(config, load_tokenizer(config.model), training=True).train
    assert groups is not None
    indices = DataOrder(len(groups), config.seed).take(0, config.train.global_batch_size)
    batch = [groups[index] for index in indices]
    logps = padded_logps(model, batch).view(-1, 2)
    ratios = logps - logps.detach()
    loss = -F.logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])).mean()
    tokens, aux_loss = sum(groups.counts.lengths[indices].tolist()), torch.zeros(())
    for rank in range(world_size):
        plan = plan_step(groups, indices, step_rules(config), Shard(rank, world_size))
        for micro in plan.batches:
            if micro.is_dummy:
                continue
            inside = [batch[place // 2] for place in micro.sequence_positions.tolist()[::2]]
            layers = zip(*(packed_router_logits(model, group) for group in inside), strict=True)
            logits: Any = tuple(torch.cat(layer) for layer in layers)
            value = load_balancing_loss_func(logits, model.num_experts, model.num_experts_per_tok)
            aux_loss = aux_loss + value * len(micro.input_ids) / tokens
    (loss + config.model.router_aux_loss_coef * aux_loss).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(aux_loss.detach()), gradients


@pytest.mark.ranks
@pytest.mark.parametrize(
    "world_size, count", [(2, 12), (4, 3)], ids=["micro-batches", "a-rank-without-groups"]
)
def test_zero3_equals_plain_pytorch_when_ranks_reach_different_experts(
    world_size, count, tmp_path, tokenizer_folder
):
    """One expert of eight for each token: the two of a rank without groups reach two at most. The ranks stay
    in step all the same, because all experts of a layer are one parameter."""
    config = config_of("Mixtral", tmp_path, tokenizer_folder, 0.7, num_local_experts=8, num_experts_per_tok=1)
    config = config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": count})})
    _, want = plain_step(config, world_size)
    got = run_ranks(world_size, zero3_steps, config, 1)[0][0][1]
    assert got.keys() == want.keys()
    for name in want:
        assert relative_error(got[name], want[name]) < 1e-5, name


def train(shard, config: Config) -> None:
    run_training(config, "madpo train test.yaml")


@pytest.mark.ranks
def test_the_metric_is_the_mean_over_the_step_and_the_start_says_what_it_weighs(
    tmp_path, tokenizer_folder, capfd
):
    config = config_of("Mixtral", tmp_path, tokenizer_folder, 0.7)
    want, _ = plain_step(config, 2)
    short = config.train.model_copy(update={"max_steps": 1, "export": False})
    run_ranks(2, train, config.model_copy(update={"train": short}))
    line = json.loads((Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()[0])
    assert line["aux_loss"] == pytest.approx(want, rel=1e-5)
    assert "4 experts a layer; the loss that keeps them in balance weighs 0.7" in capfd.readouterr().out


def test_a_family_without_the_loss_is_refused():
    for family in ("Llama 3", "Llama 4"):
        with pytest.raises(ValueError, match=r"router_aux_loss_coef: 0\.1, but transformers has no"):
            expert_balance(tiny_model(family, "eager"), 0.1)


def test_reward_models_have_none(tmp_path):
    with pytest.raises(
        ValueError, match=r"model\.router_aux_loss_coef: it is not computed for reward models"
    ):
        make_config(
            tmp_path,
            {
                "model": {"model_name_or_path": "m", "router_aux_loss_coef": 0.1},
                "data": {"dataset_name": "d"},
                "objective": {"loss_type": "bradley_terry"},
            },
        )


def test_the_tokens_of_a_packed_row_are_part_of_the_run_where_the_loss_is(tmp_path):
    def of(coef: float, tokens: int) -> dict[str, Any]:
        model = {"model_name_or_path": "m", "router_aux_loss_coef": coef}
        tree = {"model": model, "data": {"dataset_name": "d"}, "train": {"micro_batch_tokens": tokens}}
        return identity(make_config(tmp_path, tree), Shard(0, 1))

    assert of(0.0, 256) == of(0.0, 512)
    assert of(0.1, 256) != of(0.1, 512)
