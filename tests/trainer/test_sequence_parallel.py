"""Rows in slices: several ranks to a packed row compute what plain padded PyTorch and a single rank do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, tiny_model
from harness import make_config, random_groups, run_ranks, save_model, sentence, without_clock, write_pairs
from kernel_cases import relative_error
from lora_cases import changed, train
from plain import compare, plain_steps, zero3_steps
from small_runs import cut_off

from madpo.trainer.batches.packing import pack
from madpo.trainer.batches.sequence_slices import slice_of
from madpo.trainer.batches.steps import StepRules, plan_step, step_rules
from madpo.trainer.checkpoints.identity import identity, model_identity
from madpo.trainer.config.schema import Config
from madpo.trainer.data.training_data import load_data
from madpo.trainer.dist import Shard
from madpo.trainer.model.attention import prefix_sharing
from madpo.trainer.model.attention.prefix_sharing import SegmentTable
from madpo.trainer.model.backbone import last_hidden
from madpo.trainer.model.startup.slices import check_slicing
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.objectives.base import Item
from madpo.trainer.sequence_parallel import join
from madpo.trainer.stages.evaluate import run_evaluation
from madpo.trainer.stages.probe import run_probe
from madpo.trainer.stages.start_engine import start_engine

ranks = pytest.mark.ranks

BATCH = 7
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 9,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
}


@pytest.fixture
def config(tmp_path, tokenizer_folder) -> Config:
    return config_of(tmp_path, tokenizer_folder)


def config_of(folder: Path, tokenizer: Path, **model: Any) -> Config:
    names = {
        key: str(save_model(folder / key, tokenizer, seed, **model))
        for key, seed in (("model_name_or_path", 1), ("ref_model_name_or_path", 2))
    }
    write_pairs(folder / "pairs" / "train.jsonl", 40)
    write_pairs(folder / "pairs" / "test.jsonl", 11, seed=9)
    return make_config(
        folder,
        {
            "model": names,
            "data": {"dataset_name": str(folder / "pairs"), "dataset_test_split": "test"},
            "objective": {"loss_type": "madpo", "tau": 2.0},
            "optim": {"lr": 1e-3, "weight_decay": 0.01},
            "train": {"global_batch_size": BATCH},
        },
    )


def in_slices(config: Config, size: int, **sections: Any) -> Config:
    train = {**sections.pop("train", {}), "sequence_parallel_size": size}
    return changed(config, train=train, **sections)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_slices_make_up_the_row(size):
    """Tokens with at most size - 1 behind them that only see each other; every scored row once."""
    batch = pack(random_groups(3))
    tokens = len(batch.input_ids)
    slices = [slice_of(batch, index, size) for index in range(size)]
    length = len(slices[0].input_ids)
    assert {len(part.input_ids) for part in slices} == {length} and 0 <= size * length - tokens < size
    assert torch.equal(torch.cat([part.input_ids for part in slices])[:tokens], batch.input_ids)
    assert torch.equal(torch.cat([part.position_ids for part in slices])[:tokens], batch.position_ids)
    owned: Any = [part.own_tokens for part in slices]
    assert torch.cat(owned).sort().values.tolist() == list(range(len(batch.scored_positions)))
    for index, part in enumerate(slices):
        assert torch.equal(part.scored_positions + index * length, batch.scored_positions[part.own_tokens])
        end = part.segments[len(batch.segments) :]
        assert part.segments[: len(batch.segments)] == batch.segments
        assert [tuple(s) for s in end] == [(tokens, size * length, tokens, tokens)] * (size * length > tokens)


def test_the_groups_of_a_rank_do_not_depend_on_who_shares_them(config):
    """Two groups of two ranks have the rows that two ranks have, with twice the budget."""
    groups = load_data(config, load_tokenizer(config.model), training=True).train
    assert groups is not None
    indices = np.arange(20)
    whole = [plan_step(groups, indices, StepRules(Item.EDGE, 256), Shard(rank, 2)) for rank in (0, 1)]
    for rank in range(4):
        rules = step_rules(in_slices(config, 2, train={"micro_batch_tokens": 128}))
        step = plan_step(groups, indices, rules, Shard(rank, 4))
        assert (step.copies, step.num_edges) == (2, whole[0].num_edges)
        for part, batch in zip(step.batches, whole[rank // 2].batches, strict=True):
            assert torch.equal(part.targets, batch.targets)
            assert part.scale == 2 * batch.scale  # DeepSpeed's mean is over twice as many ranks


def models_in_slices(shard, families: list[str]) -> dict[str, tuple[float, float]]:
    """family -> relative errors of this slice's hidden states, and of the gradients of all parameters."""
    import torch.distributed as dist

    group = join(shard.world_size, 1.0)
    assert group is not None
    prefix_sharing.register()
    out = {}
    for family in families:
        model = tiny_model(family, prefix_sharing.NAMES["sdpa"], vocab_size=307)
        batch = pack(random_groups(3, completions=3))
        part = slice_of(batch, group.index, group.size)
        whole = last_hidden(model, batch, SegmentTable(batch.segments))
        weights = torch.randn(whole.shape, generator=torch.Generator().manual_seed(0))
        (whole * weights).sum().backward()
        named = {name: p for name, p in model.named_parameters() if p.grad is not None}
        want = {name: p.grad.clone() for name, p in named.items()}
        model.zero_grad()
        own = last_hidden(model, part, SegmentTable(part.segments, group))
        here = slice(group.index * len(own), (group.index + 1) * len(own))
        hidden = own[: len(whole[here])]
        (hidden * weights[here]).sum().backward()
        for parameter in named.values():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)
        got: Any = [p.grad.flatten() for p in named.values()]
        true = [gradient.flatten() for gradient in want.values()]
        out[family] = (
            float(relative_error(hidden.detach(), whole[here].detach())),
            float(relative_error(torch.cat(got), torch.cat(true))),
        )
    return out


@ranks
@pytest.mark.parametrize(
    "size, families", [(2, list(FAMILIES)), (4, ["Llama 3", "Llama 4", "Gemma 2", "gpt-oss"])], ids=["2", "4"]
)
def test_every_family_computes_the_same_in_slices(size, families):
    """Windows, chunks, sinks, soft-caps, temperatures, experts; for 4 ranks two share a head of keys."""
    for errors in run_ranks(size, models_in_slices, families):
        assert list(errors) == families
        for family, (hidden, gradients) in errors.items():
            assert hidden < 1e-5 and gradients < 1e-5, family


@ranks
@pytest.mark.parametrize("model", MODELS)
def test_zero3_ranks_that_share_rows_equal_plain_pytorch(model, tmp_path, tokenizer_folder):
    """Two ranks to a row, and two such groups, with several micro-batches."""
    config = config_of(tmp_path, tokenizer_folder, **MODELS[model])
    want = plain_steps(config, 2)
    compare(run_ranks(2, zero3_steps, in_slices(config, 2), 2)[0], want)
    small = in_slices(config, 2, train={"micro_batch_tokens": 70})
    compare(run_ranks(4, zero3_steps, small, 2)[0], want)


def all_steps(shard, configs: list[Config], steps: int) -> list[Any]:
    return [zero3_steps(shard, config, steps) for config in configs]


OBJECTIVES: dict[str, dict[str, Any]] = {
    "of the whole batch": {"loss_type": "beta_dpo"},
    "with completions of other prompts": {"loss_type": "kto"},
    "of distributions": {"loss_type": "tdpo"},
    "of lengths": {"loss_type": "simpo"},
    "imitation": {"loss_type": "nll"},
}


@ranks
@pytest.mark.slow
def test_other_objectives_equal_a_single_rank(config):
    configs = []
    for block in OBJECTIVES.values():
        reference = block["loss_type"] in ("simpo", "nll")
        model = {"ref_model_name_or_path": None} if reference else {}
        configs.append(changed(config, objective=block, model=model))
    want = run_ranks(1, all_steps, configs, 2)[0]
    got = run_ranks(4, all_steps, [in_slices(one, 2) for one in configs], 2)[0]
    for name, ours, theirs in zip(OBJECTIVES, got, want, strict=True):
        assert len(ours) == 2, name
        compare(ours, theirs)


def own_tokens(shard, config: Config) -> tuple[Any, int]:
    """Two steps of one group each, and the scored rows of this rank's slice in the first."""
    groups = load_data(config, load_tokenizer(config.model), training=True).train
    assert groups is not None
    step = plan_step(groups, np.array([0]), step_rules(config), shard)
    return zero3_steps(shard, config, 2), len(step.batches[0].scored_positions)


@ranks
@pytest.mark.parametrize("changes", [{}, {"head_impl": "triton"}], ids=["torch", "triton"])
def test_one_group_alone_and_slices_without_a_scored_row(config, tmp_path, changes):
    """A long prompt with short completions, of which the first two ranks of four hold the prompt only."""
    random = np.random.default_rng(3)
    prompt = " ".join(sentence(random, 5, 6) for _ in range(8))
    rows = [{"prompt": prompt, "chosen": f" good {i}", "rejected": f" bad cold {i}"} for i in range(3)]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_name": str(path), "dataset_test_split": None, "max_length": 100}
    config = changed(config, data=data, train={"global_batch_size": 1, **changes})
    objectives = [{"loss_type": "dpo"}] if changes else [{"loss_type": "dpo"}, {"loss_type": "tdpo"}]
    for objective in objectives:
        run = changed(config, objective=objective)
        want = run_ranks(1, zero3_steps, run, 2)[0]
        results = run_ranks(4, own_tokens, in_slices(run, 4))
        assert [count > 0 for _, count in results] == [False, False, False, True]
        compare(results[0][0], want)


@ranks
def test_an_adapter_and_recomputed_activations_equal_a_single_rank(config):
    """The reference is the policy without its adapter, in slices like it."""
    adapter = changed(
        config,
        model={"ref_model_name_or_path": None, "gradient_checkpointing": True},
        peft={"lora_r": 4, "lora_alpha": 8},
    )
    want = run_ranks(1, zero3_steps, adapter, 2)[0]
    compare(run_ranks(4, zero3_steps, in_slices(adapter, 2), 2)[0], want)


def records(config: Config) -> list[dict[str, Any]]:
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [without_clock(json.loads(line)) for line in lines]


@ranks
def test_metrics_and_evaluation_are_those_of_one_rank_and_a_run_resumes(config, tmp_path):
    """Every item counts once, tokens too; what was cut off continues bit for bit; the weights can be
    evaluated with another number of ranks to a row."""
    run = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "export": False, "global_batch_size": 3}
    alone = changed(config, output_dir=str(tmp_path / "alone"), train=run)
    shared = in_slices(config, 2, output_dir=str(tmp_path / "shared"), train=run)
    run_ranks(1, train, alone)
    run_ranks(4, train, shared)
    want, got = records(alone), records(shared)
    assert len(want) == len(got) == 6
    for one, two in zip(want, got, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            assert two[name] == pytest.approx(one[name], rel=2e-5, abs=1e-6), name

    cut = cut_off(shared, tmp_path / "cut", 2)
    run_ranks(4, train, cut)
    assert records(cut) == got

    run_ranks(4, evaluate, in_slices(cut, 4))
    found = json.loads((Path(cut.output_dir) / "evaluation.json").read_text())
    for name in (name for name in got[-1] if name.startswith("eval_")):
        assert found[name] == pytest.approx(got[-1][name], rel=2e-5, abs=1e-6), name


def test_the_ranks_to_a_row_are_part_of_a_run_but_not_of_its_weights(config):
    key, shard = "train.sequence_parallel_size", Shard(0, 4)
    assert identity(in_slices(config, 2), shard)[key] == 2
    assert key not in model_identity(config, shard)


def evaluate(shard, config: Config) -> None:
    run_evaluation(config)


def probe(shard, config: Config) -> None:
    run_probe(config)


@ranks
def test_a_probe_counts_every_completion_once(config, tmp_path):
    found = []
    for size in (1, 2):
        run = in_slices(config, size, output_dir=str(tmp_path / f"probe{size}"))
        run_ranks(size, probe, run)
        found.append(json.loads((Path(run.output_dir) / "probe.json").read_text()))
    assert found[0].pop("of") == found[1].pop("of")
    assert found[1].pop("percentiles") == pytest.approx(found[0].pop("percentiles"), rel=1e-5)
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def saved_bytes(shard, size: int) -> int:
    """What backward needs of one forward of the backbone, without parameters."""
    group = join(size, 1.0)
    prefix_sharing.register()
    options = {"vocab_size": 307, "num_key_value_heads": 4}  # fewer would be copied for 4 ranks
    model = tiny_model("Llama 3", prefix_sharing.NAMES["sdpa"], **options)
    batch = pack(random_groups(40))
    if group is not None:
        batch = slice_of(batch, group.index, size)
    seen = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}
    kept = []

    def count(x: torch.Tensor) -> torch.Tensor:
        kept.append(x)  # alive, so that no other gets its address
        seen.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        last_hidden(model, batch, SegmentTable(batch.segments, group))
    return sum(seen.values())


@ranks
def test_a_rank_keeps_its_share_of_the_activations():
    (whole,) = run_ranks(1, saved_bytes, 1)
    for size in (2, 4):
        shares = [kept / whole for kept in run_ranks(size, saved_bytes, size)]
        assert all(share == pytest.approx(1 / size, rel=0.1) for share in shares)


def refused(shard, wrong: bool) -> None:
    group = join(shard.world_size, 1.0)
    assert group is not None
    prefix_sharing.register()
    model = tiny_model("Llama 3", prefix_sharing.NAMES["sdpa"], vocab_size=307)
    if wrong:  # as a model that takes positions from the row
        model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: output + torch.arange(output.shape[1])[:, None] / 10
        )
    check_slicing(model, group, torch.device("cpu"))


@ranks
def test_the_check_at_start_refuses_a_model_that_slicing_changes():
    run_ranks(2, refused, False)
    with pytest.raises(AssertionError, match="on a row in slices its hidden states are off by"):
        run_ranks(2, refused, True)


def start(shard, config: Config) -> None:
    start_engine(config, load_tokenizer(config.model), training=True)


@ranks
def test_ranks_and_heads_must_divide(config):
    with pytest.raises(AssertionError, match=r"2 ranks do not form groups of 4; start a multiple of 4 ranks"):
        run_ranks(2, start, in_slices(config, 4))
    with pytest.raises(
        AssertionError, match=r"3 ranks cannot share 4 heads, 2 of keys and values, evenly; .* allows 1, 2, 4"
    ):
        run_ranks(3, refused, False)


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"objective": {"loss_type": "bradley_terry"}}, "reward models are not trained in slices"),
        ({"model": {"router_aux_loss_coef": 0.1}}, "router_aux_loss_coef: it is a loss of whole rows"),
        (
            {"data": {"max_length": 1000}},
            r"micro_batch_tokens: 256 .*max_length 1000, with 2 ranks to a row; set it to at least 1000\b",
        ),
    ],
)
def test_what_cannot_be_in_slices_is_refused(sections, message):
    needed = {"data": {"dataset_name": "d"}, "model": {"model_name_or_path": "m"}}
    tree = {key: {**needed.get(key, {}), **sections.get(key, {})} for key in needed | sections}
    with pytest.raises(ValueError, match=message):
        make_config(Path("folder"), {**tree, "train": {"sequence_parallel_size": 2}})
