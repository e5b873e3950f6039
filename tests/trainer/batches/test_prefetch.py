"""Steps made in the background: the same ones, errors in their turn, and no thread that stays."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import make_config, random_groups, run_ranks, save_model, write_pairs
from patience import patient

from madpo.trainer import loop
from madpo.trainer.batches.cost import StepWork
from madpo.trainer.batches.packing import pack
from madpo.trainer.batches.prefetch import AHEAD, prefetched
from madpo.trainer.batches.steps import Step, StepRules
from madpo.trainer.config.schema import Config
from madpo.trainer.data.lengths import shapes_of
from madpo.trainer.data.training_data import load_data
from madpo.trainer.errors import UserError
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.objectives.base import Item
from madpo.trainer.stages.start_engine import start_engine
from madpo.trainer.state import TrainState

CPU = torch.device("cpu")


def made(numbers: list[int], log: list[tuple[int, str]], fail_at: int | None = None) -> Iterator[Step]:
    for number in numbers:
        if number == fail_at:
            raise UserError(f"row {number} is bad")
        log.append((number, threading.current_thread().name))
        batches, rules = [pack(random_groups(1, seed=number))], StepRules(Item.EDGE, 64)
        yield Step(batches, 2, 1, number, StepWork(), shapes_of([]), np.empty(0), rules)


def prefetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_all_steps_come_in_order_from_another_thread():
    log: list[tuple[int, str]] = []
    assert [step.num_groups for step in prefetched(made(list(range(7)), log), CPU)] == list(range(7))
    assert {name for _, name in log} == {"prefetch_0"}
    assert not prefetch_threads()


def test_it_is_ahead_while_a_step_is_computed_and_no_further():
    log: list[tuple[int, str]] = []
    for step in prefetched(made(list(range(9)), log), CPU):
        if step.num_groups == 3:
            deadline = time.monotonic() + patient(10)
            while len(log) < 4 + AHEAD and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.05)
            assert len(log) == 4 + AHEAD


def test_an_error_comes_in_its_turn_with_its_message():
    seen = []
    with pytest.raises(UserError, match="row 3 is bad"):
        for step in prefetched(made(list(range(9)), [], fail_at=3), CPU):
            seen.append(step.num_groups)
    assert seen == [0, 1, 2]
    assert not prefetch_threads()


@pytest.mark.parametrize("how", ["break", "raise"])
def test_the_thread_ends_with_the_loop(how):
    """Also while the exception, and with it the frame of the loop, is still held."""

    def train() -> None:
        for step in prefetched(made(list(range(99)), []), CPU):
            assert prefetch_threads()
            if step.num_groups == 2 and how == "break":
                break
            if step.num_groups == 2:
                raise RuntimeError("out of memory")

    if how == "break":
        train()
        assert not prefetch_threads()
    else:
        with pytest.raises(RuntimeError, match="out of memory") as held:
            train()
        assert held.value.__traceback__ is not None and not prefetch_threads()


def test_steps_for_a_gpu_are_made_in_pinned_memory_by_a_thread_on_that_gpu(monkeypatch):
    """With stand-ins for the two calls that need a GPU."""
    pinned, devices = list[str](), list[tuple[str, str]]()

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(threading.current_thread().name)
        return tensor.clone()

    def set_device(device: torch.device) -> None:
        devices.append((str(device), threading.current_thread().name))

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    log: list[tuple[int, str]] = []
    steps = list(prefetched(made([0, 1], log), torch.device("cuda", 3)))
    assert devices == [("cuda:3", "prefetch_0")] and set(pinned) == {"prefetch_0"}
    for step, want in zip(steps, made([0, 1], []), strict=True):
        found, wanted = (vars(x.batches[0]) for x in (step, want))
        tensors = {name for name, value in wanted.items() if isinstance(value, torch.Tensor)}
        assert len(pinned) == 2 * len(tensors) and all(torch.equal(found[x], wanted[x]) for x in tensors)
        assert all(found[name] == wanted[name] for name in wanted.keys() - tensors)
    pinned.clear()
    assert len(list(prefetched(made([0], log), CPU))) == 1 and not pinned and len(devices) == 1


@pytest.mark.ranks
def test_the_state_counts_what_was_trained_on_and_not_what_was_read(tmp_path: Path, tokenizer_folder):
    model = save_model(tmp_path / "start", tokenizer_folder, seed=1)
    config = make_config(
        tmp_path,
        {
            "model": {"model_name_or_path": str(model)},
            "data": {"dataset_name": str(write_pairs(tmp_path / "pairs.jsonl", 40))},
            "train": {"max_steps": 4},
        },
    )
    states, taken, threads = run_ranks(1, watched_training, config)[0]
    assert states == [(step, 8 * step) for step in (1, 2, 3)]
    assert taken == [(8 * step, 8) for step in range(4)]
    assert not threads


def watched_training(shard, config: Config) -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[str]]:
    """Stopped by an error after the third step, when the fourth has been taken from the source."""
    tokenizer = load_tokenizer(config.model)
    source = load_data(config, tokenizer, training=True).source
    assert source is not None
    engine = start_engine(config, tokenizer, training=True)
    state, states, taken, original = (
        TrainState(),
        list[tuple[int, int]](),
        list[tuple[int, int]](),
        source.take,
    )

    def take(consumed: int, count: int):
        taken.append((consumed, count))
        return original(consumed, count)

    def on_record(record: loop.Record) -> None:
        assert np.isfinite(record["loss"])
        states.append((state.step, state.consumed))
        if state.step == 3:
            raise KeyboardInterrupt

    setattr(source, "take", take)  # noqa: B010
    with suppress(KeyboardInterrupt):
        loop.train(config, engine, source, None, shard, state, loop.Unsaved(), on_record)
    engine.release()
    return states, taken, prefetch_threads()
