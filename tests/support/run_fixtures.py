"""Fixtures of runs and tokenizers, for the folders whose conftest.py imports them."""

from __future__ import annotations

import shutil

import pytest
from harness import run_ranks
from small_runs import changed, config_of, train
from transformers import AutoTokenizer

from madpo.trainer.config.schema import Config


@pytest.fixture
def config(tmp_path, tokenizer_folder) -> Config:
    return config_of(tmp_path, tokenizer_folder)


@pytest.fixture
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory, tokenizer_folder) -> Config:
    """A run of one step on two ranks; not to be written into."""
    run = config_of(tmp_path_factory.mktemp("once"), tokenizer_folder)
    run = changed(run, train={"max_steps": 1, "export": False})
    run_ranks(2, train, run)
    return run


@pytest.fixture(scope="session")
def saved_twice(tmp_path_factory, tokenizer_folder) -> Config:
    """A run of four steps on two ranks, with checkpoints of steps 2 and 4; not to be written into."""
    run = config_of(tmp_path_factory.mktemp("twice"), tokenizer_folder)
    run = changed(run, train={"max_steps": 4, "save_steps": 2, "eval_steps": None, "export": False})
    run_ranks(2, train, run)
    return run


@pytest.fixture
def finished(trained_once, tmp_path) -> Config:
    """A finished run in a folder of its own."""
    run = changed(trained_once, output_dir=str(tmp_path / "finished"))
    shutil.copytree(trained_once.output_dir, run.output_dir)
    return run
