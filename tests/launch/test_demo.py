"""The demo's commands are ones that a user could type: they resolve, and share their model and data."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import rated_archive
from patience import patient

from madpo.launch.demo import COMMANDS, CONFIGS, FOLDER, RUNS, TABLE_ROWS
from madpo.trainer.config.schema import Config, load
from madpo.trainer.reports.progress import metrics_table


def resolved() -> list[tuple[str, Config]]:
    return [
        (task, load(CONFIGS / config, [word for word in words if not word.startswith("--")]))
        for task, config, *words in COMMANDS
    ]


def test_every_command_resolves_into_a_run_that_the_summary_reads():
    folders = [config.output_dir for _, config in resolved()]
    assert folders == [str(FOLDER / name) for name in ("sft", *RUNS.values())]


def test_madpo_and_dpo_differ_in_the_objective_only():
    (_, madpo), (_, dpo) = resolved()[2:]
    assert (madpo.objective.loss_type, dpo.objective.loss_type) == ("madpo", "dpo")
    assert madpo.objective.beta == dpo.objective.beta
    same = {"objective": None, "output_dir": ""}
    assert madpo.model_copy(update=same) == dpo.model_copy(update=same)


def test_the_warm_up_is_the_start_and_the_reference():
    (_, sft), *others = resolved()
    for _, config in others:
        assert config.model.model_name_or_path == f"{sft.output_dir}/model"
        assert config.model.ref_model_name_or_path is None


def test_metrics_table_has_a_row_per_metric_and_a_gap_where_one_is_missing():
    lines = metrics_table({"a": {"x": 0.5, "y": 1.0}, "b": {"y": 2.0}}).splitlines()
    assert lines[0].split() == ["metric", "a", "b"]
    assert lines[1].split() == ["x", "0.5000"]
    assert lines[2].split() == ["y", "1.0000", "2.0000"]


def test_metrics_table_shows_counts_and_errors_and_no_accuracy_where_all_pairs_are_ties():
    start = {"eval_rewards/accuracies": 0.0, "eval_rewards/margins": 0.0, "eval_num_pairs": 1218}
    later = start | {"eval_rewards/accuracies": 0.5, "eval_rewards/accuracies_stderr": 0.0143}
    _, *lines = metrics_table({"a": start, "b": later}).splitlines()
    assert [line.split() for line in lines] == [
        ["eval_rewards/accuracies", "-", "0.5000", "±", "0.0143"],
        ["eval_rewards/margins", "0.0000", "0.0000"],
        ["eval_num_pairs", "1,218", "1,218"],
    ]


@pytest.mark.parametrize(
    "file, overrides, stages",
    [
        ("demo_recipe.yaml", ["vars.epochs=2"], ["data", "sft", "reward", "margins", "madpo", "dpo"]),
        ("quickstart.yaml", [], ["data", "sft"]),
    ],
)
def test_the_recipes_on_the_demos_data_could_start(file, overrides, stages):
    from madpo.launch.recipes.read import read
    from madpo.launch.recipes.runner import checked

    recipe = read(CONFIGS / file, overrides)
    assert [stage.name for stage in recipe.stages] == stages
    for stage in recipe.stages:
        checked(stage, recipe)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.launcher
@pytest.mark.timeout(patient(1200))
def test_the_demo_trains_compares_and_reports(tmp_path):
    """All of it, as `make demo` runs it: both runs move away from the warm-up, and are better for it."""
    rated_archive.place(tmp_path / FOLDER / "data")
    done = subprocess.run(
        [sys.executable, "-m", "madpo.launch.cli", "demo"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("\n$ madpo ") == len(COMMANDS)
    lines = done.stdout.split("Held-out pairs", 1)[1].splitlines()
    header, *table = [re.sub(r" ± \S+", "", line).split() for line in lines[2:] if line]
    assert header == ["metric", *RUNS]
    rows = {name: values for name, *values in table[: len(TABLE_ROWS)]}
    assert rows["eval_rewards/accuracies"][0] == "-"  # the warm-up is its own reference: all pairs are ties
    rows["eval_rewards/accuracies"][0] = "nan"
    rows = {name: list(map(float, values)) for name, values in rows.items()}
    assert tuple(rows) == TABLE_ROWS
    assert rows["eval_rewards/margins"][0] == rows["eval_kl"][0] == 0.0
    for run in (1, 2):
        assert rows["eval_rewards/accuracies"][run] > 0.55 and rows["eval_kl"][run] > 0
        assert rows["eval_logps/accuracies_per_token"][run] > rows["eval_logps/accuracies_per_token"][0]
    folder = tmp_path / FOLDER
    assert (folder / "report.html").read_text().count("<svg")
    assert json.loads((folder / "madpo" / "run.json").read_text())["world_size"] == 2
    assert (folder / "madpo" / "model" / "model.safetensors").is_file()
    assert f"model   {FOLDER / 'madpo' / 'model'}" in done.stdout
