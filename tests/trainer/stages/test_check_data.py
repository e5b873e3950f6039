"""`madpo check-data`: all data as training reads it, and its exit status."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import command
from harness import make_config
from rich.console import Console
from transformers import AutoTokenizer
from turn_templates import CHATML

from madpo.trainer.config.schema import dump, load
from madpo.trainer.data.training_data import load_data
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.stages.check_data import check_data

GOOD = {"prompt": "the film:", "chosen": " good", "rejected": " bad", "margin": 1.0}
ROWS = [
    GOOD,
    {**GOOD, "prompt": "a"},
    {**GOOD, "chosen": " bad", "rejected": " good"},
    {**GOOD, "chosen": " good" * 40},
    {**GOOD, "prompt": "b"},
    GOOD,
]
BAD = {**GOOD, "chosen": 3}


@pytest.fixture
def config(tmp_path, tokenizer_folder) -> Path:
    for split, rows in (("train", ROWS), ("test", [GOOD, {**GOOD, "prompt": "c"}])):
        (tmp_path / "pairs").mkdir(exist_ok=True)
        (tmp_path / "pairs" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "model": {"model_name_or_path": str(tokenizer_folder)},
        "data": {"dataset_name": str(tmp_path / "pairs")},
        "train": {"max_steps": 2},
    }
    path = tmp_path / "c.yaml"
    path.write_text(dump(make_config(tmp_path, tree)))
    return path


def checked(config: Path, *overrides: str) -> tuple[int, str, dict[str, Any]]:
    """Exit status, output with errors, and the report."""
    status, out, errors = command("check-data", str(config), *overrides)
    report = config.parent / "run" / "data_report.json"
    return status, out + errors, json.loads(report.read_text()) if report.exists() else {}


def add_bad_row(config: Path) -> str:
    path = config.parent / "pairs" / "train.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(BAD) + "\n")
    return f"{path}:{len(ROWS) + 1}"


def test_the_report_is_that_of_training_with_lengths_and_held_out_rows_that_are_trained_on(config):
    status, out, report = checked(config)
    assert status == 0 and list(report) == ["train", "test"]
    resolved = load(config)
    of_training = load_data(resolved, load_tokenizer(resolved.model), training=True).report
    for split, facts in report.items():
        keys = of_training[split].keys() & facts.keys() - {"where"}
        assert {key: of_training[split][key] for key in keys} == {key: facts[key] for key in keys}
        assert keys >= {"rows", "groups", "tokens", "margins"}
    assert of_training["test"]["held_out_examples_in_training"] == 1
    assert report["train"]["lengths"]["both together"]["longest"] == 64
    assert report["train"]["truncated_completions"] == 1
    assert report["train"]["repeated_examples"] == 1 and report["train"]["contradicting_examples"] == 3
    place = str(config.parent / "pairs" / "test.jsonl:1")
    assert report["test"]["held_out_examples_in_training"] == 1 and report["test"]["where"] == {
        "held_out_examples_in_training": [place]
    }
    assert f"(first: {place})" in out and "prompt" in out


def test_of_a_stream_the_counts_are_those_of_the_whole_set(config):
    _, _, whole = checked(config)
    status, _, report = checked(config, "data.streaming=true", "data.stream_block=4")
    assert status == 0
    for key in ("rows", "groups", "tokens", "lengths", "repeated_examples", "truncated_completions"):
        assert report["train"][key] == whole["train"][key]
    assert report["test"] == whole["test"]
    assert report["train"]["contradicting_examples"] >= 2, "an earlier block does not know of a later one"


def test_bad_rows_are_status_3_whatever_is_done_with_them(config):
    place = add_bad_row(config)
    for setting in ("data.on_bad_row=drop", "data.streaming=true"):
        status, out, report = checked(config, setting)
        assert status == 3 and f"1 dropped: unreadable (first: {place}: chosen: expected text" in out
        assert f"\n  {place}: chosen: expected text" in out
        assert ("training would stop there" in out) == (setting != "data.on_bad_row=drop")
        assert report["train"]["groups"] == len(ROWS)


def test_data_that_the_objective_cannot_use_are_an_error_after_the_report(config):
    path = config.parent / "pairs" / "train.jsonl"
    path.write_text(path.read_text().replace(', "margin": 1.0', ""))
    status, out, report = checked(config, "objective={loss_type: madpo}")
    assert status == 2 and "6 of 6 rows have no margin" in out and report["train"]["groups"] == len(ROWS)
    path.write_text(json.dumps({**GOOD, "rejected": GOOD["chosen"]}) + "\n")
    status, out, report = checked(config)
    assert status == 3 and "its only row cannot be trained on" in out and report["train"]["groups"] == 0


def test_an_example_with_a_token_that_the_model_does_not_have_cannot_be_read(config, tokenizer_folder):
    """Of the model nothing but its config is there."""
    _, out, _ = checked(config)
    assert "the tokens are not compared with the model's: " in out
    model = shutil.copytree(tokenizer_folder, config.parent / "small")
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 290}))
    status, out, report = checked(config, f"model.model_name_or_path={model}")
    place = config.parent / "pairs" / "train.jsonl"
    assert status == 3 and f"\n  {place}:" in out and "has no row in the model's embedding" in out
    bad = report["train"]["dropped"]["unreadable"]
    assert 0 < bad == len(ROWS) - report["train"]["groups"]


def test_a_mixture_has_a_report_for_each_part_and_repeats_are_found_across_them(config):
    pairs = config.parent / "pairs"
    parts = f"data.datasets=[{{path: {pairs}, test_split: test}}, {{path: {pairs / 'test.jsonl'}}}]"
    status, _, report = checked(config, "data.dataset_name=null", parts)
    assert status == 0 and list(report) == ["train", "train 1", "train 2", "test", "test 1"]
    assert report["train 2"]["repeated_examples"] == report["train 2"]["contradicting_examples"] == 1
    assert report["test"]["held_out_examples_in_training"] == 2


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_what_is_not_scored_is_not_told_of_rewards(config, tokenizer_folder, streaming):
    """Which are read off the last token of a completion."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(config.parent / "chat")
    user, answer = ({"role": role, "content": "x"} for role in ("user", "assistant"))
    row = {"prompt": [user], "chosen": [answer, user, answer], "rejected": [{**answer, "content": "y"}]}
    (config.parent / "pairs" / "train.jsonl").write_text(json.dumps(row) + "\n")
    for objective in ("dpo", "bradley_terry"):
        _, out, report = checked(
            config,
            f"objective={{loss_type: {objective}}}",
            f"data.streaming={streaming}",
            f"model.model_name_or_path={config.parent / 'chat'}",
        )
        told = "not trained on" in out, "unscored_completion_tokens" in report["train"]
        assert told == ((objective == "dpo",) * 2) and report["train"]["groups"] == 1


def test_a_narrow_terminal_gets_the_parts_below_one_another(config):
    pairs = config.parent / "pairs"
    parts = f"data.datasets=[{{path: {pairs}, test_split: test}}, {{path: {pairs / 'test.jsonl'}}}]"
    resolved = load(config, ["data.dataset_name=null", parts])
    for columns, tables in ((80, 3), (4000, 1)):
        terminal = Console(file=io.StringIO(), width=columns)
        check_data(resolved, terminal)
        out = terminal.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
        starts = ("rows ", "groups ", "tokens ", "  a ", "  both ")
        lines = [line for line in out.splitlines() if line.startswith(starts) and "5 %" not in line]
        assert sum(line.startswith("  a prompt ") for line in lines) == tables
        assert max(map(len, lines)) <= columns and not any(line.endswith(" /") for line in lines)


def test_the_report_of_a_run_stays_as_it_is(config):
    folder = config.parent / "run"
    folder.mkdir()
    for name in ("run.json", "data_report.json"):
        (folder / name).write_text("{}")
    (folder / "config.yaml").write_text(config.read_text())
    status, out, _ = command("check-data", str(folder))
    assert status == 0 and (folder / "data_report.json").read_text() == "{}"
    assert json.loads((folder / "data_check.json").read_text())["train"]["rows"] == len(ROWS)
    assert "data_check.json" in out
