"""A config with comments is the same config, and says what every key is."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from config_keys import filled
from harness import make_config

from madpo.trainer.config.commented import WIDTH, commented
from madpo.trainer.config.schema import Config, dump, load

ODD = {
    "data": {
        "datasets": [{"path": "a.jsonl", "columns": {"chosen": "good # one"}}, {"path": "b.jsonl"}],
        "chat_template_kwargs": {"system": "be brief\n# and kind\n\n  now " + "long " * 40},
    },
    "model": {"model_name_or_path": "a/very/long/path/to/a/model/that/leaves/no/room/beside/it"},
    "objective": {"loss_type": ["dpo", "ipo"], "loss_weights": [1.0, 2.0]},
}


def configs(folder: Path) -> dict[str, Config]:
    model = {"model_name_or_path": "m"}
    plain = make_config(folder, {"model": model, "data": {"dataset_name": "d"}})
    return {"plain": plain, "filled": filled(plain), "odd": make_config(folder, ODD)}


@pytest.mark.parametrize("name", ["plain", "filled", "odd"])
def test_comments_change_no_value(tmp_path, name):
    config = configs(tmp_path)[name]
    text = commented(config)
    assert yaml.safe_load(text) == yaml.safe_load(dump(config))
    if name != "filled":  # which has sections that no config can have together
        (tmp_path / "c.yaml").write_text(text)
        assert load(tmp_path / "c.yaml") == config


@pytest.mark.parametrize("width", [80, WIDTH])
def test_every_key_has_a_comment_beside_it_or_over_it(tmp_path, width):
    lines = commented(configs(tmp_path)["plain"], width).splitlines()
    comments = {line.index("#") for line in lines if "#" in line and line.split("#")[0].strip()}
    assert len(comments) == 1, "they begin in one column"
    assert max(len(line) for line in lines if "#" in line) <= width
    bare = [line for before, line in pairwise(lines) if "#" not in line + before.lstrip()[:1]]
    assert bare == ["  zero_optimization:", "    stage3_param_persistence_threshold: 0"]
    assert "  lr: 0.001" in "\n".join(lines) and "# highest learning rate" in "\n".join(lines)
