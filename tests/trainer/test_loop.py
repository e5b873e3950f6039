"""The loop, seen from outside on one rank: which seeds, which clock, which mode, which lines."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import make_config, run_ranks, save_model, write_pairs

from madpo.trainer import loop, waiting
from madpo.trainer import step as trainer_step
from madpo.trainer.agreement import Told
from madpo.trainer.config.schema import Config
from madpo.trainer.data.training_data import load_data
from madpo.trainer.incidents import Incidents
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.objectives.base import BatchState
from madpo.trainer.schedule import learning_rate
from madpo.trainer.stages.start_engine import start_engine
from madpo.trainer.state import TrainState

STEPS, SIZE, STEP, EVALUATION, SAVE = 6, 4, 0.5, 32.0, 1024.0


@pytest.fixture(scope="module")
def config(tmp_path_factory, tokenizer_folder) -> Config:
    folder = tmp_path_factory.mktemp("loop")
    model = save_model(folder / "start", tokenizer_folder, seed=1)
    write_pairs(folder / "pairs" / "train.jsonl", 9)
    write_pairs(folder / "pairs" / "test.jsonl", 5, seed=9)
    return make_config(
        folder,
        {
            "seed": 7,
            "model": {
                "model_name_or_path": str(model),
                "sync_ref_model": True,
                "ref_model_sync_steps": 2,
                "ref_model_mixup_alpha": 0.3,
            },
            "data": {"dataset_name": str(folder / "pairs"), "dataset_test_split": "test"},
            "objective": {"loss_type": "beta_dpo"},
            "optim": {"lr": 3e-3},
            "train": {
                "max_steps": STEPS,
                "global_batch_size": SIZE,
                "logging_steps": 2,
                "eval_on_start": True,
                "eval_steps": 2,
                "save_steps": 3,
            },
        },
    )


def watched(
    shard, config: Config, stop_at: int | None = None, begun: TrainState | None = None
) -> dict[str, Any]:
    """A run on a clock that only steps, evaluations and checkpoints move forward.

    A rank is asked to stop in step `stop_at`. `begun` is the state of a run that goes on.
    """
    clock = SimpleNamespace(now=0.0)
    read = SimpleNamespace(perf_counter=lambda: clock.now, monotonic=lambda: clock.now, time=lambda: 0.0)
    for module in (loop, waiting):
        setattr(module, "time", read)  # noqa: B010
    tokenizer = load_tokenizer(config.model)
    data = load_data(config, tokenizer, training=True)
    assert data.source is not None
    engine: Any = start_engine(config, tokenizer, training=True)
    state, seen = (
        begun or TrainState(),
        SimpleNamespace(records=[], modes=[], moves=[], trained=[], evaluated=[]),
    )
    rates = []
    originals = trainer_step.train_step, trainer_step.evaluation_step, loop.evaluate, engine.step

    def train_step(engine, step, rate, meter, now: BatchState) -> Any:
        seen.trained.append((now.seed, dict(now.memory)))
        return originals[0](engine, step, rate, meter, now)

    def evaluation_step(engine, step, meter, now: BatchState) -> None:
        seen.evaluated.append((state.step, now.seed, dict(now.memory), dict(state.memory)))
        assert not engine.module.training
        originals[1](engine, step, meter, now)

    def evaluate(*args: Any) -> Any:
        clock.now += EVALUATION
        return originals[2](*args)

    def step(learning_rate: float) -> bool:
        clock.now += STEP
        seen.modes.append(engine.module.training)
        is_updated = originals[3](learning_rate)
        rates.append(engine.deepspeed.optimizer.param_groups[0]["lr"])
        return is_updated

    class Saves:
        last_step: int | None = None

        def agree(self, stop: int, save: bool, odd: bool = False) -> Told:
            return Told(stop=signal.SIGTERM if state.step == stop_at else stop, save=save, odd=odd)

        def save(self) -> None:
            clock.now += SAVE
            seen.records.append({"saved": state.step})
            self.last_step = state.step

        def finish(self) -> None:
            seen.records.append({"finished": state.step})

    loop.train_step, loop.evaluation_step, loop.evaluate = train_step, evaluation_step, evaluate
    loop.move_reference = lambda policy, reference, alpha, seed, device: seen.moves.append(
        (state.step, alpha, seed)
    )
    engine.step = step
    incidents = Incidents(Path(config.output_dir).parent, shard.is_main)
    ended = loop.train(
        config,
        engine,
        data.source,
        data.held_out,
        shard,
        state,
        Saves(),
        seen.records.append,
        incidents=incidents,
    )
    engine.release()
    return {**vars(seen), "rates": rates, "state": vars(state), "ended": ended}


@pytest.fixture(scope="module")
def run(config) -> dict[str, Any]:
    return run_ranks(1, watched, config)[0]


def kind(record: dict[str, Any]) -> tuple[str, int]:
    if "saved" in record:
        return "save", record["saved"]
    if "finished" in record:
        return "finished", record["finished"]
    return "evaluation" if "eval_loss" in record else "steps", record["step"]


@pytest.mark.ranks
def test_lines_evaluations_and_checkpoints_come_when_they_are_due(run):
    """A checkpoint closes a line; the starting model is evaluated, and the last step logged too and saved."""
    assert list(map(kind, run["records"])) == [
        ("evaluation", 0),
        *(("steps", 2), ("evaluation", 2), ("steps", 3), ("save", 3)),
        *(("steps", 4), ("evaluation", 4), ("steps", 6), ("evaluation", 6), ("save", 6)),
        ("finished", 6),
    ]
    assert run["ended"] == 0


@pytest.mark.ranks
def test_the_time_of_a_step_is_that_of_the_lines_own_steps_and_of_nothing_else(run):
    """Neither evaluations nor checkpoints count, nor the steps of earlier lines."""
    lines = [record for record in run["records"] if "loss" in record]
    assert [line["perf/step_time"] for line in lines] == [STEP] * 4
    tokens = [line["num_tokens"] for line in lines]
    for line, new, steps in zip(lines, map(int.__sub__, tokens, [0, *tokens]), (2, 1, 1, 2), strict=True):
        assert line["perf/tokens_per_second"] == pytest.approx(new / (steps * STEP))


@pytest.mark.ranks
def test_every_step_is_taken_in_training_mode_also_after_an_evaluation(run):
    assert run["modes"] == [True] * STEPS


@pytest.mark.ranks
def test_every_move_of_the_reference_is_rounded_by_draws_of_its_own(run):
    """Equal draws would push a weight the same way every time; and a continuation must find them."""
    assert run["moves"] == [(2, 0.3, 9), (4, 0.3, 11), (6, 0.3, 13)]


@pytest.mark.ranks
def test_objectives_of_the_batch_get_the_runs_seed_the_step_and_what_they_left_behind(run):
    assert [seed for seed, _ in run["trained"]] == [(7, step) for step in range(STEPS)]
    memories = [memory for _, memory in run["trained"]]
    assert memories[0] == {} and len({json.dumps(memory) for memory in memories}) == STEPS


@pytest.mark.ranks
def test_an_evaluation_sees_the_memory_of_its_step_and_other_draws_for_every_stretch(run):
    """5 held-out groups are two chunks of a step's size."""
    assert [(step, seed) for step, seed, *_ in run["evaluated"]] == [
        (step, (7, chunk)) for step in (0, 2, 4, 6) for chunk in (0, 1)
    ]
    for step, _, memory, of_training in run["evaluated"]:
        assert memory == of_training and (memory != {}) == (step > 0)
    assert run["state"]["memory"] == run["evaluated"][-1][2], "an evaluation leaves no memory behind"


@pytest.mark.ranks
def test_the_rate_of_a_step_is_the_schedules_and_its_line_says_it(run, config):
    want = [learning_rate(config.optim, step, STEPS) for step in range(STEPS)]
    assert run["rates"] == want
    lines = [record for record in run["records"] if "loss" in record]
    assert [line["learning_rate"] for line in lines] == [want[line["step"] - 1] for line in lines]


@pytest.mark.ranks
def test_lines_say_how_far_the_run_has_come(run):
    lines = [record for record in run["records"] if "step" in record]
    assert [line["epoch"] for line in lines] == [round(SIZE * line["step"] / 9, 4) for line in lines]
    state = run["state"]
    assert (state["step"], state["consumed"]) == (STEPS, STEPS * SIZE)
    assert state["num_tokens"] == lines[-2]["num_tokens"] > 0


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_number_that_is_not_finite_stops_a_run(name, wrong):
    sound = {"loss": 1.0, "grad_norm": 0.0}
    loop._check_finite(sound, 3, 2)
    with pytest.raises(
        ValueError, match=r"step 3: loss is .*; the run stops, its checkpoint of step 2 stays"
    ):
        loop._check_finite({**sound, name: wrong}, 3, 2)
    with pytest.raises(ValueError, match=r"there is no checkpoint yet"):
        loop._check_finite({**sound, name: wrong}, 3, 0)


@pytest.mark.ranks
def test_a_run_that_is_asked_to_stop_saves_after_the_step_and_goes_on_with_the_evaluation_that_it_left_out(
    config,
):
    (cut,) = run_ranks(1, watched, config, 4)
    assert cut["ended"] == signal.SIGTERM and cut["state"]["step"] == 4
    assert list(map(kind, cut["records"]))[-3:] == [("steps", 4), ("save", 4), ("finished", 4)]
    (rest,) = run_ranks(1, watched, config, None, TrainState(**cut["state"]))
    assert list(map(kind, rest["records"])) == [
        *(("evaluation", 4), ("steps", 6), ("evaluation", 6), ("save", 6), ("finished", 6)),
    ]


@pytest.mark.ranks
def test_a_checkpoint_that_is_due_by_time_waits_for_a_log_line(config, monkeypatch):
    """A step takes 0.5 s and an evaluation 32 s on this clock."""
    monkeypatch.setattr(loop, "MINUTES_BETWEEN_SAVES", 1.2 / 60)
    train = {**config.train.model_dump(), "save_steps": "auto", "eval_steps": None, "max_steps": 9}
    (run,) = run_ranks(1, watched, make_config_like(config, train))
    kinds = [each for each in map(kind, run["records"]) if each[0] != "evaluation"]
    # Due after step 3, and then each time three steps after a save.
    assert kinds == [
        *(("steps", 2), ("steps", 4), ("save", 4), ("steps", 6), ("steps", 8), ("save", 8)),
        *(("steps", 9), ("save", 9), ("finished", 9)),
    ]


def make_config_like(config: Config, train: dict[str, Any]) -> Config:
    return Config.model_validate(config.model_dump(by_alias=True) | {"train": train})
