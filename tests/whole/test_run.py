"""Whole runs on forked ranks: metrics, evaluation, resume, export."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from harness import LLAMA, make_config, run_ranks, without_clock
from small_runs import changed, records, train

from madpo.trainer import lives
from madpo.trainer.checkpoints.folders import checkpoints_in
from madpo.trainer.checkpoints.manifest import read
from madpo.trainer.config.schema import Config

pytestmark = pytest.mark.ranks


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
    "perf/slowest_rank",
    "perf/rank_spread",
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
    (life,) = lives.read(folder)
    assert (life.life, life.first_step, life.last_step, life.ranks, life.status) == (1, 0, 6, 2, 0)


def test_metrics_are_those_of_the_global_batch(config, tmp_path):
    """Whatever the number of ranks, ranks without a group and dummy batches included."""
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


def test_two_runs_cannot_share_a_folder(config):
    lock = FileLock(Path(config.output_dir) / ".lock")
    Path(config.output_dir).mkdir()
    with lock, pytest.raises(AssertionError, match=r"another run .*is training into"):
        run_ranks(2, train, config)


def test_a_launcher_that_starts_a_run_again_and_again_at_one_step_is_told_to_stop(config, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    folder = Path(config.output_dir)
    folder.mkdir()
    (folder / ".starts.json").write_text("[0, 0, 0]")
    with pytest.raises(AssertionError, match=r"UserError: the launcher .* 3 times at step 0"):
        run_ranks(2, train, config)


def test_gradients_that_stay_not_finite_end_the_run_before_its_checkpoint(config):
    with pytest.raises(
        AssertionError, match=r"NotFiniteError: step 2: the gradient was not fini.* in 2 steps"
    ):
        run_ranks(2, poisoned, changed(config, train={"save_steps": 2, "max_skipped_steps": 2}), {1, 2})
    folder = Path(config.output_dir)
    assert not any(folder.glob("checkpoints/*"))
    assert [incident["in_a_row"] for incident in incidents(folder)] == [1, 2]


NOT_FINITE: dict[str, Any] = {
    "stage 3": (2, {}),
    "alone, stage 2, bf16": (1, {"deepspeed": {"zero_optimization": {"stage": 2}}, "train": {"bf16": True}}),
    "stage 1, bf16": (2, {"deepspeed": {"zero_optimization": {"stage": 1}}, "train": {"bf16": True}}),
}


@pytest.mark.parametrize("name", NOT_FINITE)
def test_a_step_whose_gradient_is_not_finite_changes_nothing_and_is_counted(config, tmp_path, name):
    """In the middle of a log line: the line's numbers are those of its other steps."""
    ranks, sections = NOT_FINITE[name]
    train = {"logging_steps": 2, "max_steps": 4, "save_steps": 3, "eval_steps": None, "export": False}
    run = changed(config, **{**sections, "train": {**train, **sections.get("train", {})}})
    run_ranks(ranks, poisoned, run, {2})
    folder = Path(run.output_dir)
    lines = [line for line in records(folder) if "loss" in line]
    assert [line["step"] for line in lines] == [2, 3, 4]
    assert [line["train/skipped_steps"] for line in lines] == [1, 1, 1]
    assert "grad_norm" not in lines[0] and all(math.isfinite(line["loss"]) for line in lines)
    (incident,) = incidents(folder)
    assert (incident["kind"], incident["step"], incident["in_a_row"]) == ("skipped", 2, 1)
    assert len(incident["loss_of_ranks"]) == ranks and len(incident["rows"]) == 8

    state = read(checkpoints_in(folder / "checkpoints")[0]).state
    assert (state.skipped, state.skipped_in_a_row, state.consumed) == (1, 0, 32)
    first = lines[0]
    assert first["loss"] == pytest.approx(math.log(2) * first["madpo/weight_mean"], rel=1e-2)


def incidents(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "incidents.jsonl").read_text().splitlines()]


def poisoned(shard, config: Config, steps: set[int]) -> None:
    """The gradients of the last rank are NaN in these steps, as its losses are."""
    from madpo.trainer import loop

    original, count = loop.train_step, itertools.count(1)

    def train_step(engine, step, *args: Any) -> Any:
        if next(count) in steps and shard.rank == shard.world_size - 1:
            batches = [dataclasses.replace(batch, scale=math.nan) for batch in step.batches]
            step = dataclasses.replace(step, batches=batches)
        return original(engine, step, *args)

    loop.train_step = train_step
    train(shard, config)


def test_a_finished_run_is_left_as_it_is(finished):
    before = (Path(finished.output_dir) / "metrics.jsonl").read_bytes()
    run_ranks(2, train, finished)
    assert (Path(finished.output_dir) / "metrics.jsonl").read_bytes() == before


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
    with pytest.raises(AssertionError, match=r"9 weights missing from its files, model\.layers\.2"):
        run_ranks(2, train, changed(config, model={"model_name_or_path": str(broken)}))


def test_fails_clearly_when_model_and_tokenizer_do_not_belong_together(config, tmp_path):
    from madpo.trainer.data.rated_sentences import train_tokenizer

    train_tokenizer(
        ["many different words: " + " ".join(f"w{i}x{i * 7}" for i in range(400))],
        900,
        tmp_path / "big",
    )
    run = changed(config, model={"tokenizer_name_or_path": str(tmp_path / "big")})
    with pytest.raises(
        AssertionError, match=r"train\.jsonl:1: token \d+ .* has no row .* has 311.* do not belong together"
    ):
        run_ranks(1, train, run)
