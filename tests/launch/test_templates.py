"""Templates of `madpo init`: each is a config or a recipe that could start, with rows that it could read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from commands import command

from madpo.launch.recipes.read import read
from madpo.launch.recipes.runner import checked
from madpo.launch.templates import FOLDER, commands, templates, write
from madpo.trainer.config.schema import Config, load
from madpo.trainer.errors import UserError
from madpo.trainer.formats.text_groups import layout_of, to_group

WANTED = {"dpo", "madpo", "lora", "sft", "reward", "kto", "simpo", "multi-node"}
LAYOUT = {"sft": "messages", "kto": "unpaired"}


def config_of(path: Path) -> Config:
    task = path.stem if path.stem in ("sft", "reward") else "train"
    return load(path, task=task)


@pytest.mark.parametrize("name", sorted(WANTED - {"madpo"}))
def test_a_template_is_a_config_that_could_start(name):
    config = config_of(FOLDER / f"{name}.yaml")
    assert config.output_dir == f"runs/{name}"
    assert config.train.save_steps and config.data.dataset_test_split == "test"


def test_madpo_is_a_recipe_whose_stages_could_start():
    recipe = read(FOLDER / "madpo.yaml", [])
    assert [stage.name for stage in recipe.stages] == ["reward", "margins", "madpo"]
    for stage in recipe.stages:
        checked(stage, recipe)


@pytest.mark.parametrize("name", sorted(WANTED))
def test_the_rows_in_its_head_are_rows_that_its_loss_can_read(name):
    rows = re.findall(r"^#   (\{.*\})$", (FOLDER / f"{name}.yaml").read_text(), flags=re.MULTILINE)
    assert rows
    for row in map(json.loads, rows):
        layout = layout_of(row, supervised=name == "sft")
        assert layout == LAYOUT.get(name, "preference")
        assert to_group(row, layout, supervised=name == "sft").completions


def test_init_writes_a_template_under_its_new_name_and_says_what_comes_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = command("init", "mine", "--template", "simpo")
    lines = [line.strip() for line in out.splitlines()]
    assert status == 0
    assert lines[1:] == ["madpo show-data mine.yaml", "madpo train mine.yaml", "madpo evaluate mine.yaml"]
    assert load("mine.yaml").output_dir == "runs/mine"
    written = Path("mine.yaml").read_text()
    assert command("init", "mine.yaml")[2].startswith("error: mine.yaml: is there already")
    assert Path("mine.yaml").read_text() == written
    assert command("init")[0] == 0 and load("dpo.yaml").objective.loss_type == "dpo"


def test_several_nodes_get_the_script_that_the_command_names(tmp_path):
    config, script = write("multi-node", tmp_path / "big.yaml")
    assert script.read_bytes() == (FOLDER.parents[1] / "slurm" / "train.sbatch").read_bytes()
    (line,) = [line for line in commands(config.read_text()) if line.startswith("sbatch")]
    assert line.endswith(f"{script} {config}")


def test_the_list_has_a_line_for_each_and_an_unknown_name_is_refused(tmp_path):
    assert set(templates()) == WANTED
    status, out, _ = command("init", "--list")
    assert status == 0 and [line.split()[0] for line in out.splitlines()] == sorted(WANTED)
    assert all(len(line) <= 100 for line in out.splitlines())
    with pytest.raises(UserError, match="--template: lore: no such template, did you mean 'lora'"):
        write("lore", tmp_path / "x.yaml")
    assert not (tmp_path / "x.yaml").exists()
