"""Whose time a step takes: a slow rank is told from those that wait for it."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import make_config, run_ranks, save_model, write_pairs

from madpo.trainer import loop, waiting
from madpo.trainer.config.schema import Config
from madpo.trainer.data.training_data import load_data
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.stages.start_engine import start_engine
from madpo.trainer.state import TrainState
from madpo.trainer.waiting import StepClock, count_waits, waited

SECONDS = 0.1


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    now = SimpleNamespace(now=0.0)
    monkeypatch.setattr(waiting, "time", SimpleNamespace(perf_counter=lambda: now.now))
    return now


def test_waits_are_not_a_ranks_own_time_and_pauses_are_no_time_at_all(clock):
    steps = StepClock(torch.device("cpu"))
    clock.now += 1.0
    with waited():
        clock.now += 2.0
        with waited():  # one collective made of others counts once
            clock.now += 4.0
    with steps.paused(), waited():
        clock.now += 8.0
    clock.now += 16.0
    assert steps.take() == (23.0, 17.0)
    with waited():
        clock.now += 32.0
    assert steps.take() == (32.0, 0.0)
    steps.stop()
    with waited():
        clock.now += 64.0
    assert steps.take() == (64.0, 64.0), "it has stopped counting"


def test_a_collective_waits_when_it_is_called_and_when_its_handle_is_waited_for(clock):
    def called(seconds: float) -> SimpleNamespace:
        clock.now += seconds
        return SimpleNamespace(wait=lambda: called(2.0), is_completed=lambda: True)

    names: dict[str, Any] = {name: staticmethod(called) for name in waiting.COLLECTIVES}
    backend: Any = type("Backend", (), names)()
    for _ in range(2):  # a second engine of the process changes nothing
        count_waits(backend)
    steps = StepClock(torch.device("cpu"))
    handle = backend.all_reduce(1.0)
    clock.now += 4.0
    handle.wait()
    assert handle.is_completed() and steps.take() == (7.0, 4.0)


def slow(shard, config: Config, slow_rank: int) -> list[dict[str, float]]:
    """The log lines of a run in which one rank sleeps in every forward pass."""
    tokenizer = load_tokenizer(config.model)
    data = load_data(config, tokenizer, training=True)
    assert data.source is not None
    engine: Any = start_engine(config, tokenizer, training=True)
    if shard.rank == slow_rank:
        engine.module.register_forward_pre_hook(lambda *_: time.sleep(SECONDS))
    records: list[dict[str, float]] = []
    state, saver = TrainState(), loop.Unsaved()
    loop.train(config, engine, data.source, None, shard, state, saver, records.append)
    engine.release()
    return records


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [1, 3])
def test_the_slow_one_of_two_ranks_has_a_name_in_every_line(tmp_path, tokenizer_folder, stage):
    model = save_model(tmp_path / "start", tokenizer_folder, seed=1)
    write_pairs(tmp_path / "pairs.jsonl", 16)
    config = make_config(
        tmp_path,
        {
            "model": {"model_name_or_path": str(model)},
            "data": {"dataset_name": str(tmp_path / "pairs.jsonl")},
            "deepspeed": {"zero_optimization": {"stage": stage}},
            "train": {"max_steps": 4, "global_batch_size": 4, "logging_steps": 2},
        },
    )
    for slow_rank in (0, 1):
        for records in run_ranks(2, slow, config, slow_rank):
            assert [record["perf/slowest_rank"] for record in records] == [slow_rank] * 2
            for record in records:
                # Half of the difference: the median of two is in the middle.
                waits = record["perf/rank_spread"] * record["perf/step_time"]
                assert SECONDS / 2 * 0.5 < waits < record["perf/step_time"]
