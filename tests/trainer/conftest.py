"""What several folders of tests start from."""

from __future__ import annotations

import pytest
from small_runs import config_of
from transformers import AutoTokenizer

from madpo.trainer.config.schema import Config


@pytest.fixture
def config(tmp_path, tokenizer_folder) -> Config:
    return config_of(tmp_path, tokenizer_folder)


@pytest.fixture
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)
