"""A run folder in place of a config, and the objective of a config that names none."""

from __future__ import annotations

from pathlib import Path

import pytest

from madpo.trainer.config.schema import dump, load

TEXT = "output_dir: {run}\nmodel: {{model_name_or_path: m}}\ndata: {{dataset_name: d}}\n"


@pytest.fixture
def path(tmp_path) -> Path:
    """A config that names no objective."""
    file = tmp_path / "c.yaml"
    file.write_text(TEXT.format(run=tmp_path / "run"))
    return file


@pytest.fixture
def run(path, tmp_path) -> Path:
    """The folder of a run with it, under another name than when it was trained."""
    folder = tmp_path / "run"
    folder.mkdir()
    overrides = ["objective={loss_type: f_alpha, alpha: 0.5}", "seed=7", "output_dir=elsewhere"]
    (folder / "config.yaml").write_text(dump(load(path, overrides, "sft")))
    return folder


def test_a_run_folder_is_its_config_and_where_it_is_now(run):
    config = load(run, ["optim.lr=0.5"], "export")
    assert (config.output_dir, config.seed, config.optim.lr) == (str(run), 7, 0.5)
    assert load(run, ["output_dir=other"]).output_dir == "other"


@pytest.mark.parametrize("task", ["config", "show-data", "evaluate", "export"])
def test_the_objective_is_the_runs_where_a_config_names_none(path, run, task):
    assert load(path, [], task).objective.model_dump() == {"loss_type": "f_alpha", "alpha": 0.5}
    assert load(path, ["objective.alpha=0.25"], task).objective.alpha == 0.25
    assert load(path, ["objective=dpo"], task).objective.loss_type == "dpo"


@pytest.mark.parametrize("task", ["train", "config", "show-data", "evaluate", "export"])
def test_a_config_without_an_objective_or_a_run_says_what_to_do(path, task):
    with pytest.raises(ValueError, match=r"objective: is required; set objective.loss_type.*--task sft"):
        load(path, [], task)


@pytest.mark.parametrize(
    "task, loss_type", [("sft", "nll"), ("reward", "bradley_terry"), ("probe", "nll"), ("generate", "nll")]
)
def test_a_task_has_its_own_objective(path, run, task, loss_type):
    assert load(path, [], task).objective.loss_type == loss_type


@pytest.mark.parametrize("text, terms", [("dpo", None), ("sigmoid", None), ("[dpo, ipo]", ["dpo", "ipo"])])
def test_an_objective_may_be_its_name_alone(path, text, terms):
    objective = load(path, [f"objective={text}"]).objective
    if terms is None:
        assert objective.model_dump() == {"loss_type": "dpo", "beta": 0.1}
    else:
        assert [term["loss_type"] for term in objective.terms] == terms


def test_an_override_adds_to_an_objective_that_is_a_name(path):
    path.write_text(f"{path.read_text()}\nobjective: dpo\n")
    assert load(path, ["objective.beta=0.2"]).objective.model_dump() == {"loss_type": "dpo", "beta": 0.2}


@pytest.mark.parametrize(
    "name, message",
    [
        ("folder", r"folder is a folder without config.yaml, so no run's; name a YAML file or a run folder"),
        ("c.yml", r"c\.yml: no such file, did you mean .*c\.yaml\?"),
        ("empty.yaml", r"empty\.yaml: the file is empty"),
        ("list.yaml", r"list\.yaml: a config is a mapping of sections, and this is a list"),
        ("picture.png", r"picture\.png: a config is a YAML file, and this is no text"),
    ],
)
def test_what_is_no_config_is_said(path, tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name)
