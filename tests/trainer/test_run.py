"""Whole runs on forked ranks: metrics, evaluation, resume, export."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from harness import LLAMA, make_config, run_ranks, save_model, without_clock, write_pairs

from madpo.trainer import loop
from madpo.trainer.config.schema import Config
from madpo.trainer.data.training_data import load_data
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.reference.moving import rounded
from madpo.trainer.stages.evaluate import run_evaluation
from madpo.trainer.stages.export import run_export
from madpo.trainer.stages.start_engine import start_engine
from madpo.trainer.stages.train import run_training
from madpo.trainer.state import TrainState

pytestmark = pytest.mark.ranks


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def config(tmp_path, tokenizer_folder) -> Config:
    return config_of(tmp_path, tokenizer_folder)


def config_of(folder: Path, tokenizer: Path) -> Config:
    model = save_model(folder / "start", tokenizer, seed=1)
    write_pairs(folder / "pairs" / "train.jsonl", 21)
    write_pairs(folder / "pairs" / "test.jsonl", 11, seed=9)
    return make_config(
        folder,
        {
            "model": {"model_name_or_path": str(model)},
            "data": {"dataset_name": str(folder / "pairs"), "dataset_test_split": "test"},
            "objective": {"loss_type": "madpo", "tau": 2.0},
            "optim": {"lr": 3e-3, "warmup_steps": 2},
            "train": {"num_train_epochs": 2, "eval_steps": 3, "save_steps": 3},
        },
    )


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory, tokenizer_folder) -> Config:
    """A run of one step on two ranks; not to be written into."""
    run = config_of(tmp_path_factory.mktemp("once"), tokenizer_folder)
    run = changed(run, train={"max_steps": 1, "export": False})
    run_ranks(2, train, run)
    return run


@pytest.fixture
def finished(trained_once, tmp_path) -> Config:
    """A copy of it."""
    run = changed(trained_once, output_dir=str(tmp_path / "finished"))
    shutil.copytree(trained_once.output_dir, run.output_dir)
    return run


def changed(config: Config, **sections: Any) -> Config:
    tree = config.model_dump(by_alias=True)
    for section, values in sections.items():
        tree[section] = {**tree[section], **values} if isinstance(values, dict) else values
    return Config.model_validate(tree)


def with_sections(config: Config, objective: dict[str, Any], **sections: Any) -> Config:
    """As `changed`, with another objective in place of the old one."""
    tree = changed(config, **sections).model_dump(by_alias=True)
    return Config.model_validate({**tree, "objective": objective})


def train(shard, config: Config) -> None:
    run_training(config, "madpo train test.yaml")


TRL_NAMES = {
    "loss",
    "grad_norm",
    "learning_rate",
    "epoch",
    "num_tokens",
    "lengths/chosen",
    "lengths/rejected",
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
}
OUR_NAMES = {
    "step",
    "time",
    "kl",
    "perf/step_time",
    "perf/tokens_per_second",
    "perf/padded_tokens_per_second",
    "perf/prefix_savings",
    "perf/imbalance",
    "perf/tflops_per_rank",
    "perf/peak_memory_gib",
    "madpo/weight_mean",
    "madpo/weight_min",
    "madpo/weight_max",
    "logps/accuracies",
    "logps/accuracies_per_token",
}


def test_a_run_learns_and_leaves_everything_behind(config):
    run_ranks(2, train, config)
    folder = Path(config.output_dir)
    lines = records(folder)
    training = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    # 21 groups, 2 epochs, 8 a step: 5 full steps and one of two groups.
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in evaluations] == [3, 6]
    assert training[-1]["epoch"] == 2.0
    assert set(training[0]) == TRL_NAMES | OUR_NAMES
    first, last = training[0], training[-1]
    assert first["rewards/margins"] == 0.0 and first["kl"] == 0.0
    assert first["loss"] == pytest.approx(math.log(2) * first["madpo/weight_mean"], rel=1e-6)
    assert last["rewards/accuracies"] > 0.9 and last["rewards/margins"] > 0
    assert first["madpo/weight_min"] <= first["madpo/weight_mean"] <= first["madpo/weight_max"]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    for name in ("config.yaml", "run.json", "data_report.json"):
        assert (folder / name).stat().st_size
    assert json.loads((folder / "run.json").read_text())["world_size"] == 2


def test_metrics_are_those_of_the_global_batch(config, tmp_path):
    """Whatever the number of ranks, ranks without a group and filler batches included."""
    runs = []
    for world_size in (1, 2, 4):
        run = changed(
            config,
            output_dir=str(tmp_path / f"run{world_size}"),
            train={"max_steps": 2, "export": False},
        )
        run_ranks(world_size, train, run)
        runs.append([without_clock(line) for line in records(Path(run.output_dir))])
    for other in runs[1:]:
        for one, two in zip(runs[0], other, strict=True):
            assert one.keys() == two.keys()
            for name in one:
                assert two[name] == pytest.approx(one[name], rel=2e-5, abs=1e-6), name


ALONE: dict[str, Any] = {"deepspeed": {"zero_optimization": {}}, "train": {"bf16": True}}
"""For one rank, which then uses ZeRO-2."""
RESUMED = {
    "alone": ALONE,
    "memory-of-the-whole-batch": {"objective": {"loss_type": "beta_dpo"}},
    "curriculum-and-quantile": {
        "objective": {"loss_type": "mixdpo", "threshold": "quantile:0.3"},
        "data": {"order": "easy_to_hard"},
    },
    "mismatched-and-cached-reference": {
        "objective": {"loss_type": "kto"},
        "model": {"reference": "cached"},
    },
    "distributions-and-moving-reference": {
        "objective": {"loss_type": "tdpo"},
        "model": {"sync_ref_model": True, "ref_model_sync_steps": 2},
    },
}
SHORT = {"max_steps": 4, "eval_steps": 4, "save_steps": 2}
"""Three steps are an epoch."""


@pytest.mark.parametrize("sections", RESUMED.values(), ids=RESUMED)
def test_resume_is_bitwise_the_run_that_was_not_cut_off(config, tmp_path, sections):
    sections = {"objective": config.objective.model_dump(by_alias=True), **sections}
    sections["train"] = SHORT | sections.get("train", {})
    ranks = 1 if "deepspeed" in sections else 2
    whole = with_sections(config, output_dir=str(tmp_path / "whole"), **sections)
    run_ranks(ranks, train, whole)

    # The same run, cut off after the checkpoint of step 2: later files and metrics are gone or torn.
    cut = with_sections(config, output_dir=str(tmp_path / "cut"), **sections)
    shutil.copytree(whole.output_dir, cut.output_dir)
    folder = Path(cut.output_dir)
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    shutil.rmtree(folder / "model")
    (folder / "checkpoints" / "latest").write_text("step-00000002")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    run_ranks(ranks, train, cut)

    want, got = ([without_clock(line) for line in records(Path(run.output_dir))] for run in (whole, cut))
    assert got == want
    assert model_bytes(cut) == model_bytes(whole)


def test_a_moving_reference_follows_the_policy(config, tmp_path):
    """By hand from the weights of the steps: moves at 2 and 4, of a reference that begins as the policy."""
    moving = changed(
        config,
        model={"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25},
        train={"max_steps": 5, "eval_steps": None, "export": False},
    )
    weights = run_ranks(2, weights_by_step, moving)[0]
    for name, want in weights[0]["reference"].items():
        assert torch.equal(want, weights[0]["start"][name])
        for step, now in enumerate(weights, start=1):
            if step in (2, 4):
                want = torch.lerp(want, now["policy"][name], 0.25)
            torch.testing.assert_close(now["reference"][name], want)
    assert not torch.equal(weights[4]["reference"]["lm_head.weight"], weights[0]["start"]["lm_head.weight"])


def test_a_narrow_reference_moves_by_less_than_its_last_place():
    """In bfloat16 plain rounding moves a weight all the way or not at all; here the mean moves right."""
    theirs = torch.full((40_000,), -1.0, dtype=torch.bfloat16)
    ours = torch.full_like(theirs, -1.0078125)  # the next number
    mixed = torch.lerp(theirs.float(), ours.float(), 0.25)
    got = rounded(mixed, torch.Generator().manual_seed(3))
    assert set(got.tolist()) == {-1.0, -1.0078125}
    assert (got == ours).double().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(got, rounded(mixed, torch.Generator().manual_seed(3)))
    exact = torch.randn(100).bfloat16()
    assert torch.equal(rounded(exact.float(), torch.Generator()), exact)


def weights_by_step(shard, config: Config) -> list[dict[str, dict[str, torch.Tensor]]]:
    """Full weights of policy and reference after every step."""
    import deepspeed

    def weights(model) -> dict[str, torch.Tensor]:
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return {name: p.detach().clone() for name, p in model.named_parameters()}

    tokenizer = load_tokenizer(config.model)
    feed = load_data(config, tokenizer, training=True).feed
    assert feed is not None
    engine = start_engine(config, tokenizer, training=True)
    start, out = weights(engine.module.policy), []

    def keep(record) -> None:
        models = {"policy": engine.module.policy, "reference": engine.module.reference}
        out.append({"start": start, **{name: weights(model) for name, model in models.items()}})

    loop.train(config, engine, feed, None, shard, TrainState(), keep, lambda: None)
    engine.release()
    return out


def test_metrics_resume_with_intervals_that_do_not_meet(config, tmp_path):
    """A checkpoint at step 3 between log lines at 2 and 4."""
    whole = changed(config, output_dir=str(tmp_path / "whole"), train={"logging_steps": 2, "max_steps": 4})
    run_ranks(2, train, whole)
    cut = changed(whole, output_dir=str(tmp_path / "cut"))
    shutil.copytree(whole.output_dir, cut.output_dir)
    shutil.rmtree(Path(cut.output_dir) / "model")
    (Path(cut.output_dir) / "checkpoints" / "latest").write_text("step-00000003")
    run_ranks(2, train, cut)
    want, got = ([without_clock(x) for x in records(Path(run.output_dir))] for run in (whole, cut))
    assert [line["step"] for line in want if "loss" in line] == [2, 3, 4]
    assert got == want
    assert model_bytes(cut) == model_bytes(whole)


def test_a_leftover_of_a_later_step_never_costs_the_committed_checkpoint(config):
    run = changed(
        config,
        train={"max_steps": 2, "save_steps": 1, "save_total_limit": 1, "eval_steps": None, "export": False},
    )
    run_ranks(1, train, run)
    checkpoints = Path(run.output_dir) / "checkpoints"
    shutil.copytree(checkpoints / "step-00000002", checkpoints / "step-00000009")
    (checkpoints / "step-00000002").rename(checkpoints / "step-00000001")
    state = json.loads((checkpoints / "step-00000001" / "train_state.json").read_text())
    state["state"] |= {"step": 1, "consumed": 8}
    (checkpoints / "step-00000001" / "train_state.json").write_text(json.dumps(state))
    (checkpoints / "latest").write_text("step-00000001")
    run_ranks(1, train, run)
    tag = (checkpoints / "latest").read_text()
    assert tag == "step-00000002" and (checkpoints / tag).is_dir()


CHANGES = [
    ({"objective": {"loss_type": "dpo"}}, r"objective\.loss_type: 'madpo' there, 'dpo' now"),
    ({"optim": {"lr": 1e-4}}, r"optim\.lr: 0\.003 there, 0\.0001 now"),
    ({"train": {"global_batch_size": 4}}, r"train\.global_batch_size: 8 there, 4 now"),
    ({"data": {"max_length": 32}}, r"data\.max_length: 64 there, 32 now"),
    ({"seed": 1}, r"seed: 42 there, 1 now"),
]


@pytest.mark.parametrize("change, message", CHANGES, ids=[str(change) for change, _ in CHANGES])
def test_a_changed_config_is_refused_and_the_run_left_alone(finished, change, message):
    before = (Path(finished.output_dir) / "config.yaml").read_text()
    if "objective" in change:
        other = Config.model_validate(finished.model_dump(by_alias=True) | change)
    else:
        other = changed(finished, **change)
    with pytest.raises(AssertionError, match=message):
        run_ranks(2, train, other)
    assert (Path(finished.output_dir) / "config.yaml").read_text() == before


def test_changed_data_is_refused(finished, tmp_path):
    shutil.copytree(str(finished.data.dataset_name), tmp_path / "pairs")
    moved = changed(finished, data={"dataset_name": str(tmp_path / "pairs")})
    write_pairs(tmp_path / "pairs" / "train.jsonl", 21, seed=5)
    with pytest.raises(AssertionError, match=r"data \(content\)"):
        run_ranks(2, train, moved)


def test_another_number_of_ranks_is_refused(finished):
    for task in (train, evaluate_only):
        with pytest.raises(AssertionError, match=r"number of ranks: 2 there, 1 now"):
            run_ranks(1, task, finished)


def test_another_stage_of_zero_is_refused(config):
    alone = changed(config, train={"max_steps": 1, "export": False}, deepspeed={"zero_optimization": {}})
    run_ranks(1, train, alone)
    for task in (train, evaluate_only):
        with pytest.raises(AssertionError, match=r"deepspeed\.zero_optimization\.stage: 2 there, 3 now"):
            run_ranks(1, task, changed(alone, deepspeed={"zero_optimization": {"stage": 3}}))


def private_disk(shard, config: Config, folder: str) -> None:
    """Every rank with an output folder of its own, as on nodes that share no storage."""
    train(shard, changed(config, output_dir=f"{folder}/disk{shard.rank}"))


def test_ranks_that_see_different_folders_are_refused(finished, tmp_path):
    shutil.move(finished.output_dir, tmp_path / "disk0")
    with pytest.raises(AssertionError, match="output_dir must be shared storage"):
        run_ranks(2, private_disk, finished, str(tmp_path))


def test_two_runs_cannot_share_a_folder(config):
    lock = FileLock(Path(config.output_dir) / ".lock")
    Path(config.output_dir).mkdir()
    with lock, pytest.raises(AssertionError, match="another run is training into"):
        run_ranks(2, train, config)


def test_a_non_finite_gradient_stops_the_run_before_its_checkpoint(config):
    with pytest.raises(AssertionError, match=r"loss is .*, gradient norm .*; the run stops"):
        run_ranks(2, explode, changed(config, train={"save_steps": 1}))
    assert not (Path(config.output_dir) / "checkpoints" / "latest").exists()


def explode(shard, config: Config) -> None:
    """The gradient of one rank becomes NaN."""
    from madpo.trainer import engine

    original = engine.PackedBatch.to

    def poisoned(batch, device):
        scale = math.nan if shard.rank == 1 else batch.scale
        return dataclasses.replace(original(batch, device), scale=scale)

    setattr(engine.PackedBatch, "to", poisoned)  # noqa: B010
    train(shard, config)


def model_bytes(config: Config) -> bytes:
    return (Path(config.output_dir) / "model" / "model.safetensors").read_bytes()


def test_a_finished_run_is_left_as_it_is(finished):
    before = (Path(finished.output_dir) / "metrics.jsonl").read_bytes()
    run_ranks(2, train, finished)
    assert (Path(finished.output_dir) / "metrics.jsonl").read_bytes() == before


def test_only_the_newest_checkpoints_are_kept(config):
    short = {"max_steps": 3, "eval_steps": None, "save_steps": 1, "save_total_limit": 2, "export": False}
    run_ranks(1, train, changed(config, train=short))
    checkpoints = Path(config.output_dir) / "checkpoints"
    assert sorted(p.name for p in checkpoints.glob("step-*")) == ["step-00000002", "step-00000003"]
    assert (checkpoints / "latest").read_text() == "step-00000003"


@pytest.mark.parametrize("tied, bf16", [(False, True), (True, False)], ids=["untied-bf16", "tied-fp32"])
def test_the_export_loads_in_transformers_and_scores_like_the_run(
    config, tmp_path, tokenizer_folder, tied, bf16
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = save_model(tmp_path / "start", tokenizer_folder, seed=1, tied=tied)
    run = changed(config, model={"model_name_or_path": str(model)}, train={"max_steps": 3, "bf16": bf16})
    run_ranks(2, train, run)
    folder = Path(run.output_dir) / "model"
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert loaded.config._attn_implementation in ("sdpa", "eager")
    assert loaded.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    start: Any = AutoModelForCausalLM.from_pretrained(model)
    assert not torch.equal(loaded.lm_head.weight.float(), start.lm_head.weight)

    rows = [json.loads(line) for line in (tmp_path / "pairs" / "test.jsonl").read_text().splitlines()]
    total = 0.0
    with torch.no_grad():
        for row in rows:
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = tokenizer(row["prompt"] + row["chosen"])["input_ids"] + [tokenizer.eos_token_id]
            logps = loaded(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
            picked = logps.gather(1, torch.tensor(ids[1:])[:, None])[len(prompt) - 1 :]
            total += picked.sum().item()
    logged = records(Path(run.output_dir))[-1]["eval_logps/chosen"]
    assert logged == pytest.approx(total / len(rows), rel=3e-3 if bf16 else 1e-5)
    card = (folder / "README.md").read_text()
    assert "madpo" in card and "rewards/accuracies" in card


@pytest.mark.parametrize(("ranks", "sections"), [(2, {}), (1, ALONE)], ids=["two ranks", "alone"])
def test_evaluation_and_export_of_a_checkpoint_agree_with_training(config, ranks, sections):
    config = changed(config, **{**sections, "train": SHORT | sections.get("train", {})})
    run_ranks(ranks, train, config)
    folder = Path(config.output_dir)
    trained = records(folder)[-1]
    exported = model_bytes(config)
    shutil.rmtree(folder / "model")
    run_ranks(ranks, evaluate_and_export, config)
    evaluated = json.loads((folder / "evaluation.json").read_text())
    assert evaluated["model"] == "step-00000004"
    for name in ("eval_loss", "eval_rewards/accuracies", "eval_kl"):
        assert evaluated[name] == pytest.approx(trained[name], rel=1e-6)
    assert model_bytes(config) == exported


def evaluate_and_export(shard, config: Config) -> None:
    run_evaluation(config)
    run_export(config)


def test_evaluation_of_the_start_gives_a_margin_of_zero(config):
    run_ranks(2, evaluate_only, config)
    record = json.loads((Path(config.output_dir) / "evaluation.json").read_text())
    assert record["eval_rewards/margins"] == 0.0 and record["eval_kl"] == 0.0


def evaluate_only(shard, config: Config) -> None:
    run_evaluation(config)


def test_supervised_warm_up_from_scratch(config, tmp_path, tokenizer_folder):
    rows = [{"prompt": "film:", "completion": " good plot and warm story"}] * 30
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = make_config(
        tmp_path,
        {
            "output_dir": str(tmp_path / "sft"),
            "model": {
                "init_config": {**LLAMA, "tie_word_embeddings": True},
                "tokenizer_name_or_path": str(tokenizer_folder),
            },
            "data": {"dataset_name": str(path)},
            "objective": {"loss_type": "nll"},
            "optim": {"lr": 1e-2},
            "train": {"num_train_epochs": 3},
        },
    )
    run_ranks(2, train, run)
    losses = [line["loss"] for line in records(Path(run.output_dir))]
    assert losses[0] == pytest.approx(math.log(LLAMA["vocab_size"]), rel=0.05)
    assert losses[-1] < losses[0] - 1
    assert (Path(run.output_dir) / "model" / "config.json").is_file()


def test_weights_that_are_missing_are_no_random_ones(config, tmp_path):
    """A folder whose config asks for a layer more than its weights have."""
    broken = tmp_path / "broken"
    shutil.copytree(str(config.model.model_name_or_path), broken)
    description = json.loads((broken / "config.json").read_text())
    description["num_hidden_layers"] += 1
    (broken / "config.json").write_text(json.dumps(description))
    with pytest.raises(AssertionError, match=r"9 weights are missing and would be random, model\.layers\.2"):
        run_ranks(2, train, changed(config, model={"model_name_or_path": str(broken)}))


def test_fails_clearly_when_model_and_tokenizer_do_not_belong_together(config, tmp_path):
    from madpo.trainer.data.rated_sentences import train_tokenizer

    train_tokenizer(
        ["many different words: " + " ".join(f"w{i}x{i * 7}" for i in range(400))],
        900,
        tmp_path / "big",
    )
    run = changed(config, model={"tokenizer_name_or_path": str(tmp_path / "big")})
    with pytest.raises(AssertionError, match=r"the tokenizer has .* tokens and the model only 311"):
        run_ranks(1, train, run)
