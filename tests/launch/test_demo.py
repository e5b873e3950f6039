"""The demo's commands are ones that a user could type: they resolve, and share their model and data."""

from __future__ import annotations

from madpo.launch.demo import COMMANDS, CONFIGS, FOLDER, RUNS
from madpo.trainer.config import Config, load
from madpo.trainer.progress import metrics_table


def resolved() -> list[tuple[str, Config]]:
    return [(task, load(CONFIGS / config, overrides)) for task, config, *overrides in COMMANDS]


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


def test_the_demo_recipe_is_one_that_could_start():
    from madpo.launch.recipe import read
    from madpo.launch.run import checked

    recipe = read(CONFIGS / "demo_recipe.yaml", ["vars.epochs=2"])
    assert [stage.name for stage in recipe.stages] == ["data", "sft", "reward", "margins", "madpo", "dpo"]
    for stage in recipe.stages:
        checked(stage, recipe)
