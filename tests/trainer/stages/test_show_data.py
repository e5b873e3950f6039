"""What `madpo show-data` prints: the lines of a group, the totals, and the command itself."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from commands import command
from harness import make_config, write_pairs
from patience import patient
from rich.console import Console

from madpo.trainer.config.schema import Config, dump
from madpo.trainer.counted import counted
from madpo.trainer.data.order import DataOrder
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.data.tokenised_cache import load_groups
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.stages.show_data import render_group, render_totals, show_data


def decode(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


def ids(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def lines(group: TokenGroup) -> list[str]:
    return "\n".join(text.plain for text in render_group(group, decode, "f, row 1", False)).split("\n")


def test_a_pair_in_plain_text():
    group = TokenGroup(ids("a\nb:"), [ids(" c\n"), ids(" d")], [(0, 1, 2.5)], [1, -1], boundary_cut=2)
    assert lines(group) == [
        "── f, row 1",
        "prompt, 4 tokens; 2 more merge with the completion and count as its tokens",
        "│ a",
        "│ b:",
        "chosen, 3 tokens, margin 2.5",
        "│ [[ c",
        "│ ]]",
        "rejected, 2 tokens",
        "│ [[ d]]",
        "",
    ]


def test_what_is_not_scored_stands_outside_the_brackets_and_is_dim_in_colour():
    masks = [[True] * 2 + [False] * 3 + [True], [True]]
    group = TokenGroup(ids("a"), [ids("b\nc\nde"), ids("f")], [(0, 1, None)], [1, -1], masks=masks)
    assert lines(group)[3:8] == [
        "chosen, 6 tokens, 3 of them not trained on",
        "│ [[b",
        "│ ]]c",
        "│ d[[e]]",
        "rejected, 1 token",
    ]
    body = list(render_group(group, decode, "f, row 1", True))[4]
    assert body.plain == "│ b\n│ c\n│ de"
    assert [(body.plain[x.start : x.end].strip("│ "), x.style) for x in body.spans] == [
        ("b", "green"),
        ("c", "dim"),
        ("d", "dim"),
        ("e", "green"),
    ]


def test_a_ranked_group_says_who_is_better_than_whom_and_what_was_cut():
    edges: list[tuple[int, int, float | None]] = [(1, 0, 1.0), (1, 2, None), (2, 0, 0.25)]
    group = TokenGroup(ids("a"), [ids("b"), ids("c"), ids("d")], edges, [-1, 1, 0], truncated=2, equal=1)
    assert lines(group)[3:] == [
        "completion 1, 1 token",
        "│ [[b]]",
        "completion 2, 1 token, better than 1 by 1, 3",
        "│ [[c]]",
        "completion 3, 1 token, better than 1 by 0.25",
        "│ [[d]]",
        "1 pairs left out: both completions are the same tokens",
        "2 completions cut at max_length",
        "",
    ]


@pytest.mark.parametrize(
    "labels, header", [([], "completion, 1 token"), ([-1], "completion, 1 token, undesirable")]
)
def test_single_completions(labels, header):
    assert lines(TokenGroup(ids("a"), [ids("b")], [], labels))[3] == header


def test_completions_of_another_prompt_are_named():
    group = TokenGroup(ids("a"), [ids("b"), ids("c")], [], [1, 0])
    texts = [text.plain for text in render_group(group, decode, "f, row 1", False, borrows=True)]
    headers = [text for text in texts if text.startswith("completion")]
    assert headers == ["completion 1, 1 token, desirable", "completion 2, 1 token, of another prompt"]


def test_on_a_terminal_colours_take_the_place_of_brackets():
    group = TokenGroup(ids("a"), [ids("b"), ids("c"), ids("d")], [(0, 1, None), (0, 2, None), (2, 1, None)])
    group = TokenGroup(group.prompt, group.completions, group.edges, [1, -1, 0])
    texts = list(render_group(group, decode, "f, row 1", True))
    styled = {text.plain: {str(span.style) for span in text.spans} for text in texts if text.spans}
    assert styled == {"│ a": {"dim"}, "│ b": {"green"}, "│ c": {"red"}, "│ d": {"yellow"}}


def test_control_characters_do_not_reach_the_terminal():
    group = TokenGroup(ids("a\x1b[2J"), [ids("\x07b\x9b\u202e")], [])
    shown = "\n".join(lines(group))
    assert r"a\x1b[2J" in shown and r"[[\x07b\x9b\u202e]]" in shown


def test_a_completion_is_decoded_after_its_prompt():
    """A tokenizer that drops the space in front of a text must not hide it in a completion."""

    def dropping(tokens: Sequence[int]) -> str:
        return decode(tokens).removeprefix(" ")

    texts = render_group(TokenGroup(ids("a"), [ids(" b")], []), dropping, "f, row 1", False)
    assert "│ [[ b]]" in [text.plain for text in texts]


REPORT = {
    "source": "f",
    "rows": 12,
    "groups": 9,
    "dropped": {"prompt fills max_length": 2, "unreadable": 1},
    "truncated_completions": 0,
    "groups_with_moved_boundary": 3,
    "comparisons_of_equal_tokens": 0,
    "rows_that_spell_special_tokens": 1,
    "texts_that_spell_special_tokens": 8,
    "unscored_completion_tokens": 0,
    "margin_min": -1.0,
    "margin_max": 2.0,
    "margin_mean": 0.5,
}


def test_the_totals_leave_out_zeros():
    assert [text.plain for text in render_totals(REPORT, 4000, 1000, False)] == [
        "── f: 12 examples, 9 groups",
        "4,000 tokens, 25.0% of them trained on, in [[ ]]",
        "2 dropped: prompt fills max_length",
        "1 dropped: unreadable",
        "3 prompts whose last tokens merge with the completion",
        "1 conversations spell out a special token, which becomes that token",
        "8 of 12 examples are text in which a chat template was rendered before: special tokens that it "
        "spells out are letters here; data.text_holds_special_tokens=true takes them as tokens",
        r"what spells a special token as letters has a \ before it",
        "margins from -1 to 2, mean 0.5",
    ]


def config_for(folder: Path, tokenizer: Path, loss_type: str = "dpo", **data: Any) -> Config:
    path = write_pairs(folder / "pairs.jsonl", 5)
    tree = {
        "model": {"model_name_or_path": str(tokenizer)},
        "data": {"dataset_name": str(path), **data},
        "objective": {"loss_type": loss_type},
    }
    return make_config(folder, tree)


def shown(config: Config, count: int, **options: Any) -> str:
    console = Console(file=io.StringIO(), highlight=False, **options)
    show_data(config, count, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_first_groups_of_training_are_shown_in_its_order(tmp_path, tokenizer_folder):
    config = config_for(tmp_path, tokenizer_folder)
    groups, _ = load_groups(config.data, "train", load_tokenizer(config.model))
    rows = [groups.rows[i] for i in DataOrder(5, config.seed).take(0, 2)]
    output = shown(config, 2)
    places = [line for line in output.splitlines() if line.startswith("── ")]
    assert places[:2] == [f"── {groups.name}, row {row}" for row in rows]
    assert places[2].endswith("5 examples, 5 groups")
    source = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    for row in rows:
        assert f"│ <bos>{source[row - 1]['prompt']}\n" in output
        assert f"│ [[{source[row - 1]['chosen']}<eos>]]\n" in output
    assert shown(config, 99).count(", row ") == 5
    assert shown(config, 0).startswith("── ")


def test_a_terminal_gets_escape_codes_and_no_color_gets_brackets(tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    config = config_for(tmp_path, tokenizer_folder)
    coloured = shown(config, 1, force_terminal=True, color_system="standard")
    assert "\x1b[32m" in coloured and "\x1b[31m" in coloured and "[[" not in coloured
    assert "[[" in shown(config, 1, force_terminal=True, no_color=True)


def test_unpaired_objectives_show_the_borrowed_completions(tmp_path, tokenizer_folder):
    output = shown(config_for(tmp_path, tokenizer_folder, "kto"), 1)
    assert output.count(", of another prompt") == 2


def test_supervised_objectives_show_one_completion(tmp_path, tokenizer_folder):
    output = shown(config_for(tmp_path, tokenizer_folder, "nll"), 1)
    assert output.count("[[") == 2 and "\ncompletion, " in output  # the second is that of the totals


def test_data_that_cannot_serve_is_shown_before_it_is_refused(tmp_path, tokenizer_folder):
    config = config_for(tmp_path, tokenizer_folder, "madpo")
    path = tmp_path / "bare.jsonl"
    path.write_text('{"prompt": "a", "chosen": " b", "rejected": " c"}\n')
    data = config.data.model_copy(update={"dataset_name": str(path)})
    console = Console(file=io.StringIO())
    with pytest.raises(ValueError, match="have no margin"):
        show_data(config.model_copy(update={"data": data}), 1, console)
    assert isinstance(console.file, io.StringIO) and "chosen, " in console.file.getvalue()


def test_the_command_needs_no_ranks_and_prints_plain_text_into_a_pipe(tmp_path, tokenizer_folder):
    path = tmp_path / "c.yaml"
    path.write_text(dump(config_for(tmp_path, tokenizer_folder)))
    line = [sys.executable, "-m", "madpo.launch.cli", "show-data", str(path), "-n", "1", "seed=7"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=patient(120), check=False)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout and done.stdout.count(", row ") == 1
    assert done.stderr == ""
    status, _, said = command("show-data", str(path), "-n", "1", "data.adapter=nectar")
    assert status == 2 and "nectar needs the column answers" in said


def test_the_fold_that_is_left_out_is_not_shown(tmp_path, tokenizer_folder):
    whole = shown(config_for(tmp_path, tokenizer_folder), 99)
    parts = [shown(config_for(tmp_path, tokenizer_folder, folds=2, fold=fold), 99) for fold in (0, 1)]
    counts = [part.count(", row ") for part in parts]
    assert sum(counts) == whole.count(", row ") == 5 and all(counts)
    for fold, (part, count) in enumerate(zip(parts, counts, strict=True)):
        assert f"5 examples, {counted(count, 'group')}\nfold {fold} is left out\n" in part
