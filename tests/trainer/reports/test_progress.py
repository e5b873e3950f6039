"""What a run prints before its first step, and after it."""

from __future__ import annotations

from io import StringIO
from types import SimpleNamespace
from typing import Any

import torch
from rich.ansi import AnsiDecoder

from madpo.trainer.dist import Shard
from madpo.trainer.reports.progress import Progress
from madpo.trainer.state import TrainState

FACTS = {
    "groups": 8,
    "tokens": 100,
    "dropped": {"unreadable": 2, "prompt fills max_length": 1},
    "tokens_of_known_prompts": 25,
    "truncated_completions": 3,
    "groups_with_moved_boundary": 0,
    "rows": 9,
    "rows_that_spell_special_tokens": 1,
    "where": {"unreadable": ["a[0].jsonl:7: not JSON", "a[0].jsonl:9: not JSON"]},
    "texts_that_spell_special_tokens": 0,
    "unscored_completion_tokens": 0,
}


def config() -> Any:
    return SimpleNamespace(
        objective=SimpleNamespace(loss_type="madpo"),
        output_dir="runs/x[/b]",
        data=SimpleNamespace(merge_prompts=False),
        bound_objective=SimpleNamespace(supervised=False),
    )


def announced(capsys, report: dict[str, Any], state: TrainState, ranks: int, *notes: str) -> list[str]:
    Progress(10).announce(config(), report, state, Shard(0, ranks), torch.device("cpu"), (1000, 4000), notes)
    return capsys.readouterr().out.splitlines()


def test_the_counts_of_the_data_and_all_notes_are_announced(capsys):
    reports = {"train": FACTS, "test": {**FACTS, "dropped": {}, "tokens_of_known_prompts": 0}}
    cut = [
        "    3 completions cut at max_length",
        "    1 conversations spell out a special token, which becomes that token",
    ]
    assert announced(capsys, reports, TrainState(), 2, "attention is exact", "cached") == [
        "madpo on 2 ranks (cpu), into runs/x[/b]",
        "  training 1,000 of 4,000 parameters (25.00%)",
        "  train: 8 groups, 100 tokens, 25% of the tokens repeat a prompt (see data.merge_prompts)",
        "    2 dropped: unreadable (first: a[0].jsonl:7: not JSON)",
        "    1 dropped: prompt fills max_length",
        *cut,
        "  test: 8 groups, 100 tokens",
        *cut,
        "  attention is exact",
        "  cached",
    ]


def test_merged_examples_and_the_step_to_resume_from_are_announced(capsys):
    merged = {**FACTS, "rows_merged": 4, "tokens_saved_by_merging": 40, "tokens_of_known_prompts": 0}
    lines = announced(capsys, {"train": merged}, TrainState(step=5), 1)
    assert lines[0] == "madpo on 1 rank (cpu), into runs/x[/b]"
    assert "4 examples merged by prompt, 40 tokens saved" in lines[2]
    assert lines[-1] == "  resuming after step 5 of 10"


def test_a_record_is_a_line_and_an_evaluation_says_so(capsys):
    progress = Progress(10)
    progress.show({"step": 2, "loss": 0.5, "kl": 0.25})
    progress.show({"step": 4, "eval_loss": 0.5})
    assert capsys.readouterr().out.splitlines() == [
        "step 2/10  loss 0.5000  kl 0.2500",
        "step 4/10  held out: loss 0.5000",
    ]


def test_a_run_that_is_stopped_says_from_where_it_goes_on(tmp_path):
    progress, state = Progress(10), TrainState(step=7)
    assert progress.stopped(state, tmp_path).startswith("stopped at step 7 of 10; no checkpoint yet (")
    (tmp_path / "step-00000005").mkdir()
    (tmp_path / "step-00000005" / "manifest.json").touch()
    assert progress.stopped(state, tmp_path) == (
        "stopped at step 7 of 10; the last checkpoint is of step 5; the same command continues from there"
    )


def test_on_a_terminal_records_stay_above_the_bar(monkeypatch):
    screen = StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdout", screen)
    progress = Progress(10)
    progress.announce(config(), {}, TrainState(), Shard(0, 1), torch.device("cpu"), (1, 1))
    for step in (2, 4):
        progress.show({"step": step, "loss": 0.5})
    progress.close()
    lines = [AnsiDecoder().decode_line(line).plain for line in screen.getvalue().splitlines()]
    assert [line for line in lines if line.startswith("step")] == [
        f"step {n}/10  loss 0.5000" for n in (2, 4)
    ]


PAIRS = {"step": 1, "loss": 0.5, "rewards/accuracies": 0.75, "rewards/margins": 0.5, "kl": 0.25}
LABELLED = {"step": 1, "loss": 0.5, "rewards/margins": 0.5, "kl": 0.25}
SIDES = {"rewards/chosen": 0.25, "rewards/rejected": -0.25}


def test_a_line_has_the_rewards_of_labelled_completions_which_have_no_accuracy(capsys):
    for record in (PAIRS, LABELLED):
        Progress(10).show(record | SIDES)
    assert capsys.readouterr().out.splitlines() == [
        "step 1/10  loss 0.5000  acc 0.750  margin 0.500  kl 0.2500",
        "step 1/10  loss 0.5000  chosen 0.250  rejected -0.250  margin 0.500  kl 0.2500",
    ]
