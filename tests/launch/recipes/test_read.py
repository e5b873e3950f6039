"""What a recipe says: expansion, references, order, overrides, keys, and mistakes by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from madpo.launch.recipes import call
from madpo.launch.recipes.keys import keys
from madpo.launch.recipes.read import Recipe, merge, read
from madpo.trainer import user_function
from madpo.trainer.config import strict_yaml
from madpo.trainer.config.schema import DEFAULT_OBJECTIVES, from_tree
from madpo.trainer.contents import Contents

RECIPE = """
output_dir: runs/study
vars: {scale: 0.5, steps: 20, seeds: [0, 1]}
defaults: {train: {bf16: false, max_steps: "${steps}"}, objective: {loss_type: dpo, beta: 0.1}}
stages:
  dpo-${tier}-${seed}:
    for: {tier: [high, low], seed: "${seeds}"}
    task: train
    config:
      seed: ${seed}
      model: {model_name_or_path: "${sft}/model"}
      data: {dataset_name: "${labels}/${tier}", cache_dir: "${reward-${tier}}/cache"}
  sft: {task: sft, config: {objective: {loss_type: nll}}}
  labels: {task: call, function: "steps.py:label", arguments: {source: "${sft}/x", share: "${scale}"}}
  reward-${tier}:
    for: {tier: [high, low]}
    task: reward
    config: {data: {dataset_name: "${labels}/${tier}"}}
  compare: {task: call, function: "steps.py:label", after: ["dpo-*-0", "*-low"]}
"""


def written(tmp_path: Path, change: Any = None) -> Path:
    """The recipe in a file, after `change` of its tree."""
    tree = yaml.safe_load(RECIPE.replace("seed: ${seed}", 'seed: "${seed}"'))
    if change is not None:
        change(tree)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def stages(recipe: Recipe) -> dict[str, Any]:
    return {stage.name: stage for stage in recipe.stages}


def test_a_family_is_a_product_and_everything_stands_behind_what_it_needs(tmp_path):
    recipe = read(written(tmp_path))
    order = [stage.name for stage in recipe.stages]
    assert order == [
        *("sft", "labels", "reward-high", "dpo-high-0", "dpo-high-1"),
        *("reward-low", "dpo-low-0", "dpo-low-1", "compare"),
    ]
    found = stages(recipe)
    assert set(found["dpo-low-1"].after) == {"sft", "labels", "reward-low"}
    assert set(found["compare"].after) == {"dpo-high-0", "dpo-low-0", "reward-low"}
    assert found["dpo-low-1"].given == {
        "train": {"bf16": False, "max_steps": 20},
        "objective": {"loss_type": "dpo", "beta": 0.1},
        "seed": 1,
        "model": {"model_name_or_path": "runs/study/sft/model"},
        "data": {"dataset_name": "runs/study/labels/low", "cache_dir": "runs/study/reward-low/cache"},
    }
    assert found["labels"].given == {"source": "runs/study/sft/x", "share": 0.5}
    assert found["sft"].given["objective"] == {"loss_type": "nll"}  # another kind: beta is gone


def test_a_family_may_go_over_mappings_whose_values_refer_to_the_rest_of_the_scope(tmp_path):
    """One family for methods that differ in objective and data; their values are looked up like any other."""

    def change(tree: Any) -> None:
        arms = [
            {"name": "dpo", "objective": {"loss_type": "dpo"}, "data": "${labels}/${tier}"},
            {"name": "madpo", "objective": {"loss_type": "madpo", "tau": 2}, "data": "${reward-${tier}}/x"},
        ]
        tree["stages"]["${arm.name}_${tier}"] = {
            "for": {"arm": arms, "tier": ["high", "low"]},
            "task": "train",
            "config": {"objective": "${arm.objective}", "data": {"dataset_name": "${arm.data}"}},
        }

    found = stages(read(written(tmp_path, change)))
    assert found["dpo_high"].given["data"]["dataset_name"] == "runs/study/labels/high"
    assert found["dpo_high"].after == ("labels",)
    assert found["madpo_low"].given["data"]["dataset_name"] == "runs/study/reward-low/x"
    assert found["madpo_low"].given["objective"] == {"loss_type": "madpo", "tau": 2}
    assert found["madpo_low"].after == ("reward-low",)


def test_a_value_that_refers_to_itself_is_refused(tmp_path):
    def change(tree: Any) -> None:
        loop = {"for": {"arm": [{"data": "x/${arm.data}"}]}, "arguments": {"source": "${arm.data}"}}
        tree["stages"]["loop"] = {"task": "call", "function": "steps.py:label", **loop}

    with pytest.raises(ValueError, match="refers to itself"):
        read(written(tmp_path, change))


def test_a_stage_may_be_given_the_folder_of_the_whole_recipe(tmp_path):
    """Which is no stage to wait for, and changes no key."""

    def change(tree: Any) -> None:
        tree["stages"]["labels"]["arguments"]["source"] = "${output_dir}"

    def change_and_move(tree: Any) -> None:
        change(tree)
        tree["output_dir"] = "elsewhere"

    recipe = read(written(tmp_path, change))
    assert stages(recipe)["labels"].given["source"] == "runs/study" and stages(recipe)["labels"].after == ()
    assert (
        keys_of(written(tmp_path, change))["labels"] == keys_of(written(tmp_path, change_and_move))["labels"]
    )


def test_merge_goes_by_section_and_leaves_its_arguments_alone():
    below = {"train": {"a": 1, "b": 2}, "objective": {"loss_type": "dpo", "beta": 1}, "seed": 1}
    above = {"train": {"b": 3}, "objective": {"beta": 2}, "seed": None}
    assert merge(below, above) == {
        "train": {"a": 1, "b": 3},
        "objective": {"loss_type": "dpo", "beta": 2},
        "seed": None,
    }
    assert below["train"] == {"a": 1, "b": 2}


def test_a_file_lies_under_the_config_and_over_the_defaults(tmp_path):
    (tmp_path / "other.yaml").write_text("output_dir: x\ntrain: {bf16: true, max_steps: 7}\nseed: 5\n")
    path = written(tmp_path, lambda tree: tree["stages"]["sft"].update(file="other.yaml", config={"seed": 6}))
    given = stages(read(path))["sft"].given
    assert given["train"] == {"bf16": True, "max_steps": 7} and given["seed"] == 6
    assert "output_dir" not in given


def test_overrides_reach_vars_stages_patterns_and_names_with_dots(tmp_path):
    overrides = ["vars.steps=3", "dpo-*-1.train.bf16=true", "labels.share=${steps}", "output_dir=there"]
    found = stages(read(written(tmp_path), overrides))
    assert found["sft"].given["train"] == {"bf16": False, "max_steps": 3}
    assert found["dpo-low-1"].given["train"]["bf16"] is True
    assert found["dpo-low-0"].given["train"]["bf16"] is False
    assert found["labels"].given == {"source": "there/sft/x", "share": 3}

    def dotted(tree):
        tree["stages"] = {"b-${x}": {"for": {"x": [0.1, 0.5]}, "task": "train"}}

    found = stages(read(written(tmp_path, dotted), ["b-0.1.seed=9"]))
    assert (found["b-0.1"].given["seed"], "seed" in found["b-0.5"].given) == (9, False)


def test_only_takes_what_the_named_stages_need(tmp_path):
    recipe = read(written(tmp_path))
    needed = [stage.name for stage in recipe.needed_for(["dpo-high-*"]).stages]
    assert needed == ["sft", "labels", "reward-high", "dpo-high-0", "dpo-high-1"]
    assert recipe.needed_for([]) == recipe
    with pytest.raises(ValueError, match="--only: no stage 'labls', did you mean 'labels'"):
        recipe.needed_for(["labls"])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.update(stagess=1), "stagess: unknown key, did you mean 'stages'"),
        (lambda t: t.pop("output_dir"), "output_dir: is required"),
        (lambda t: t["vars"].update(x="${steps}"), "vars: their values are plain"),
        (lambda t: t.update(vars=[1]), r"vars: a mapping, got \[1\]"),
        (lambda t: t["stages"].update(x=3), "stages.x: a stage is a mapping with a task"),
        (
            lambda t: t["stages"]["sft"].update(task="trian"),
            "'trian' is no task, did you mean 'train'",
        ),
        (lambda t: t["stages"]["sft"].update(confg={}), "confg: unknown key, did you mean 'config'"),
        (lambda t: t["stages"]["sft"].update(arguments={}), "stages.sft: arguments: unknown key"),
        (lambda t: t["stages"]["labels"].pop("function"), "labels.function: a call names one"),
        (lambda t: t["stages"]["sft"]["config"].update(output_dir="x"), "output_dir: remove it"),
        (
            lambda t: t["stages"]["sft"]["config"].update(seed="${sed}"),
            r"sft.seed: \${sed} is no stage",
        ),
        (lambda t: t["stages"]["labels"]["arguments"].update(x="${lables}"), "is no stage or var"),
        (lambda t: t["stages"]["sft"]["config"].update(seed="a${seeds}"), "cannot be a part of 'a"),
        (lambda t: t["stages"]["sft"].update(after=["dpoo"]), "sft.after: no stage 'dpoo'"),
        (lambda t: t["stages"]["sft"].update(after="labels"), "sft.after: a list of names"),
        (lambda t: t["stages"]["sft"].update(after=["compare"]), "wait for each other.*sft"),
        (lambda t: t["stages"]["sft"].update({"for": {"k": 1}}), "for.k: a list of values, got 1"),
        (lambda t: t["stages"]["sft"].update({"for": {"k": [1, 2]}}), "'sft' is the name of another stage"),
        (lambda t: t["stages"]["sft"].update({"for": {"scale": [1]}}), "for.scale: is the name of a var"),
        (lambda t: t["stages"].update({"a/b": {"task": "train"}}), "'a/b' names a folder"),
        (lambda t: t["stages"].update({"vars": {"task": "train"}}), "'vars' names a folder"),
    ],
)
def test_mistakes_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read(written(tmp_path, change))


@pytest.mark.parametrize(
    "override, message",
    [
        ("vars.scael=1", "vars: scael: unknown key, did you mean 'scale'"),
        ("sftt.seed=1", "'sftt' is no stage, did you mean 'sft'"),
        ("seed=1", "write stage.section.key=value"),
    ],
)
def test_an_override_that_reaches_nothing_is_refused(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        read(written(tmp_path), [override])


def keys_of(path: Path, overrides: list[str] | None = None, source: str = "code", content: str = "rows"):
    return keys(read(path, overrides or []), lambda *_: content, lambda _: source)


def changed(one: dict[str, str], other: dict[str, str]) -> set[str]:
    return {name for name in one if one[name] != other[name]}


def test_a_key_changes_with_what_the_stage_and_those_before_it_are_given(tmp_path):
    path = written(tmp_path)
    before = keys_of(path)
    assert len(set(before.values())) == len(before) == 9
    assert changed(before, keys_of(path)) == set()
    assert changed(before, keys_of(path, ["dpo-high-1.seed=7"])) == {"dpo-high-1"}
    assert changed(before, keys_of(path, ["reward-low.seed=7"])) == {
        *("reward-low", "dpo-low-0", "dpo-low-1", "compare")
    }
    assert changed(before, keys_of(path, ["vars.scale=1"])) == before.keys() - {"sft"}
    assert changed(before, keys_of(path, source="new code")) == before.keys() - {"sft"}
    assert changed(before, keys_of(path, ["vars.steps=5"])) == before.keys()


def test_a_key_knows_nothing_of_the_folder_nor_of_how_a_result_is_come_by(tmp_path):
    path = written(tmp_path)
    overrides = ["output_dir=other", "sft.train.micro_batch_tokens=64", "sft.data.cache_dir=x"]
    assert keys_of(path, overrides) == keys_of(path)


def test_a_key_changes_with_the_content_of_files_that_no_stage_writes(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    inside = tmp_path / "out" / "sft" / "model"
    inside.mkdir(parents=True)
    path = written(tmp_path)
    folder = f"output_dir={tmp_path / 'out'}"
    own = ["sft.data.dataset_name=" + str(tmp_path / "rows.jsonl"), folder]
    assert "sft" in changed(keys_of(path, own), keys_of(path, own, content="other rows"))
    for other in (
        f"sft.data.cache_dir={tmp_path}",
        f"sft.data.dataset_name={inside}",
        f"sft.data.dataset_name={tmp_path / 'out'}",
        f"labels.source={Path.cwd()}",  # as "." or "/" may be in arguments
    ):
        assert not changed(keys_of(path, [other, folder]), keys_of(path, [other, folder], content="z"))


@pytest.mark.parametrize(
    "value",
    [
        "data.datasets=[{path: FILE}]",
        "model.model_name_or_path=FILE",
        "generate={judge: {reward_model: FILE}}",
        "generate={judge: {function: 'FILE:score'}}",
        "annotate={models: [FILE]}",
    ],
)
def test_everything_that_a_config_reads_counts(tmp_path, value):
    file = tmp_path / "judge.py"
    override = "sft." + value.replace("FILE", str(file))
    path = written(tmp_path)
    file.write_text("1")
    contents = Contents(tmp_path / "memory.json")
    before = keys(read(path, [override]), contents, lambda _: "")
    file.write_text("22")
    assert "sft" in changed(before, keys(read(path, [override]), contents, lambda _: ""))
    file.unlink()  # perhaps a name on the hub, or one that a stage writes later
    assert set(keys(read(path, [override]), contents, lambda _: "")) == set(before)


def test_a_judge_of_a_module_counts_by_its_file(tmp_path, monkeypatch):
    (tmp_path / "judge_of_a_recipe.py").write_text("1")
    monkeypatch.syspath_prepend(tmp_path)
    override = "sft.generate={judge: {function: 'judge_of_a_recipe:score'}}"
    path = written(tmp_path)
    assert "sft" in changed(keys_of(path, [override]), keys_of(path, [override], content="other"))


def test_a_folder_that_holds_the_recipes_own_counts_without_it(tmp_path):
    path, data = written(tmp_path), tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("{}")
    overrides = [f"sft.data.dataset_name={data}", f"output_dir={data / 'out'}"]

    def found() -> dict[str, str]:
        return keys(read(path, overrides), Contents(tmp_path / "memory.json"), lambda _: "")

    before = found()
    (data / "out" / "sft").mkdir(parents=True)
    (data / "out" / "sft" / "log.txt").write_text("a result")
    assert found() == before
    (data / "train.jsonl").write_text("{} ")
    assert "sft" in changed(before, found())


def test_an_empty_section_that_was_written_counts(tmp_path):
    path = written(tmp_path)
    for section in ("peft", "generate"):
        assert "sft" in changed(keys_of(path), keys_of(path, [f"sft.{section}={{}}"]))


def test_with_a_loss_of_each_packed_row_the_tokens_of_one_count(tmp_path):
    def found(coef: str, tokens: int) -> dict[str, str]:
        own = [f"sft.model.router_aux_loss_coef={coef}", f"sft.train.micro_batch_tokens={tokens}"]
        return keys_of(written(tmp_path), own)

    assert found("0.0", 4096) == found("0.0", 8192)
    assert "sft" in changed(found("0.01", 4096), found("0.01", 8192))


def test_a_call_is_checked_without_being_made(tmp_path):
    (tmp_path / "steps.py").write_text(
        "from os.path import join\nraise SystemExit\n"
        "def label(source, *, seed, output, share=1): ...\ndef free(output, **rest): ...\n"
    )
    function, text = user_function.find("steps.py:label", tmp_path)
    assert function == f"{tmp_path / 'steps.py'}:label"
    call.check(function, text, {"source": 1, "seed": 2})
    call.check("steps.py:free", text, {"anything": 1})
    call.check("steps.py:join", text, {"anything": 1})
    for name, arguments, message in (
        ("label", {"sorce": 1}, "label takes no argument sorce, did you mean 'source'"),
        ("label", {"source": 1}, "label needs the argument seed"),
        ("lable", {}, "has no function lable, did you mean 'label'"),
    ):
        with pytest.raises(ValueError, match=message):
            call.check(f"steps.py:{name}", text, arguments)
    with pytest.raises(ValueError, match=r"x\.py:1: "):
        call.check("x.py:f", "def f(:", {})
    for function, message in (("steps.py", "write module:name"), ("no_such.module:f", "there is no no_such")):
        with pytest.raises(ValueError, match=message):
            user_function.find(function, tmp_path)
    module, text = user_function.find("madpo.trainer.data.rated_sentences:prepare", tmp_path)
    assert "def prepare" in text and user_function.load(module).__name__ == "prepare"


TREE = {
    "output_dir": "x",
    "model": {"model_name_or_path": "m"},
    "data": {"dataset_name": "d"},
}


def test_a_task_brings_its_objective():
    assert {from_tree(TREE, "c", task).objective.loss_type for task in ("reward", "annotate")} == {
        "bradley_terry"
    }
    assert from_tree(TREE, "c", "sft").objective.loss_type == "nll"
    centred = from_tree({**TREE, "objective": {"center_rewards_coefficient": 0.5}}, "c", "reward").objective
    assert (centred.loss_type, centred.center_rewards_coefficient) == ("bradley_terry", 0.5)
    dft = from_tree({**TREE, "objective": {"loss_type": "dft"}}, "c", "sft")
    assert dft.objective.loss_type == "dft"
    assert "train" not in DEFAULT_OBJECTIVES
    with pytest.raises(ValueError, match="objective: is required"):
        from_tree(TREE, "c")


@pytest.mark.parametrize("task, loss_type", [("sft", "dpo"), ("reward", "nll"), ("sft", "bradley_terry")])
def test_a_task_refuses_another_kind_of_objective(task, loss_type):
    tree = {**TREE, "objective": {"loss_type": loss_type}}
    with pytest.raises(ValueError, match=f"{loss_type} is no objective of madpo {task}"):
        from_tree(tree, "c", task)


def test_text_that_looks_like_a_number_survives_the_file():
    texts = ["1e-6", "12e4", "no", "true", "1:30", "010", "~", ".5", "x: y", ""]
    tree = {"texts": texts, "others": [1e-6, 1.5, True, 3, None]}
    assert strict_yaml.parse(strict_yaml.dump(tree), "x") == tree


def test_the_recipe_in_the_documentation_expands(tmp_path):
    text = (Path(__file__).parents[3] / "docs" / "recipes.md").read_text()
    path = tmp_path / "recipe.yaml"
    path.write_text(text.split("```yaml\n")[1].split("```")[0])
    (tmp_path / "sft.yaml").write_text("output_dir: x\n")
    order = [stage.name for stage in read(path).stages]
    families = [f"dpo-{tier}-{seed}" for tier in ("high", "low") for seed in (0, 1)]
    assert order == ["data", "sft", "reward-high", "reward-low", *families, "compare"]
