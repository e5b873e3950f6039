"""Plain text that spells out special tokens: letters, or the tokens of a rendered template."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from harness import make_config
from rich.console import Console
from text_cases import config_for
from turn_templates import asks, says, tokenizers

from madpo.trainer.data.plain_text import encode_texts, foreign_marks, marks_in_messages
from madpo.trainer.data.report import findings, on_marks_in_text
from madpo.trainer.data.tokenise import TokenRules, tokenise
from madpo.trainer.data.tokenised_cache import load_groups
from madpo.trainer.formats.text_groups import TextGroup
from madpo.trainer.stages.show_data import show_data

HOLDS = TokenRules(500, text_holds_special_tokens=True)
PROMPT = "<|im_start|>user\non?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Any:
    return tmp_path_factory.mktemp("rendered")


@pytest.fixture(scope="module")
def tokenizer(folder) -> Any:
    made = tokenizers(folder)["chatml"]
    made.save_pretrained(folder)
    return made


def pair(prompt: str, chosen: str, rejected: str) -> TextGroup:
    return TextGroup(prompt, [chosen, rejected], [(0, 1, 1.0)])


def test_rendered_text_gives_the_tokens_of_the_conversation(tokenizer):
    """But for BOS, which this template does not write and this tokenizer puts before any text."""
    chat = TextGroup([asks("on?")], [[says("good")], [says("bad")]], [(0, 1, 1.0)])
    want = tokenise(chat, tokenizer, TokenRules(500))
    got = tokenise(pair(PROMPT, "good<|im_end|>\n", "bad<|im_end|>\n"), tokenizer, HOLDS)
    assert got.completions == want.completions
    assert got.prompt == [tokenizer.bos_token_id, *want.prompt]
    begun = tokenise(pair("<bos>" + PROMPT, "good<|im_end|>", "bad<|im_end|>\n"), tokenizer, HOLDS)
    assert begun.prompt == got.prompt and begun.completions[0] == want.completions[0][:-1]


@pytest.mark.parametrize("append", ["auto", "always"])
def test_only_a_completion_that_spells_no_end_gets_one(tokenizer, append):
    rules = TokenRules(500, append, text_holds_special_tokens=True)
    group = tokenise(pair(PROMPT, "good", "bad<eos>"), tokenizer, rules)
    assert [tokenizer.decode(x) for x in group.completions] == ["good<eos>", "bad<eos>"]


def test_a_prompt_keeps_the_end_that_it_spells(tokenizer):
    assert encode_texts(["a<eos>"], tokenizer, holds_special=True)[0][-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in encode_texts(["a<eos>"], tokenizer)[0]


def shown(folder: Any, **data: Any) -> str:
    rows = [
        {"prompt": PROMPT, "chosen": f"good {i}<|im_end|>\n", "rejected": "bad<|im_end|>\n"} for i in "ab"
    ]
    path = folder / "rows.jsonl"
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "prompt": "a:", "chosen": "b"}])
    )
    tree = {
        "model": {"model_name_or_path": str(folder)},
        "data": {"dataset_name": str(path), "order": "as_is", "max_length": 100, **data},
        "objective": {"loss_type": "dpo"},
    }
    console = Console(file=io.StringIO(), highlight=False)
    show_data(make_config(folder, tree), 1, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_what_was_rendered_before_is_noticed_and_shown_apart_from_tokens(folder, tokenizer):
    text = shown(folder)
    assert "│ <bos>\\<|im_start|>user\n│ on?\\<|im_end|>\n" in text
    assert "│ [[good a\\<|im_end|>\n│ <eos>]]" in text
    assert "3 of 3 examples are text in which a chat template was rendered before" in text
    assert "data.text_holds_special_tokens=true takes them as tokens" in text
    text = shown(folder, text_holds_special_tokens=True)
    assert "│ <bos><|im_start|>user\n│ on?<|im_end|>\n" in text
    assert "│ [[good a<|im_end|>\n│ ]]" in text
    assert "rendered before" not in text and "\\" not in text


@pytest.mark.parametrize("number, said", [(0, []), (5, ["5 examples spell"]), (6, ["6 of 10 examples are"])])
def test_most_examples_must_spell_special_tokens_to_be_called_rendered(number, said):
    lines = on_marks_in_text({"rows": 10, "texts_that_spell_special_tokens": number})
    assert [line[: len(start)] for line, start in zip(lines, said, strict=True)] == said


def test_marks_of_another_models_template_are_named(tokenizer):
    known = tokenizer.get_added_vocab()
    text = pair("<|im_start|>user\na [INST] b <|any|> <x>", "<\uff5cend\u2581of\uff5c>", "<start_of_turn>")
    assert foreign_marks(text, known) == ["<|any|>", "<\uff5cend\u2581of\uff5c>", "[INST]"]
    assert foreign_marks(TextGroup([asks("[INST]")], [], []), known) == []
    assert marks_in_messages(TextGroup([asks("[INST] <eos>")], ["<|x|>"], [])) == ["[INST]"]
    report = {
        "rows": 10,
        "texts_that_spell_special_tokens": 0,
        "foreign_turn_marks": {"<|any|>": 6, "[INST]": 2},
    }
    (line,) = on_marks_in_text(report)
    assert line.startswith(
        "6 of 10 examples are text with <|any|>, as another model's chat template writes it"
    )
    assert not on_marks_in_text({**report, "rows": 12})


@pytest.mark.parametrize(
    ("prompt", "completion", "found"),
    [
        ("A chat. USER: Hi ASSISTANT:", " a</s>", ["</s>"]),
        ("USER: Hi ASSISTANT: a</s>USER: so? ASSISTANT:", " b", ["</s>"]),
        ("Was it <s>wrong</s> right?", " Yes", []),
    ],
)
def test_the_end_of_sequence_of_llama_is_a_mark_where_a_turn_ends(prompt, completion, found):
    assert foreign_marks(pair(prompt, completion, "no"), {}) == found


def test_a_template_that_was_rendered_into_messages_is_said_plainly(tmp_path, tokenizer):
    turn = [{"role": "user", "content": "<|im_start|>user\nHi<|im_end|>"}]
    row = {"prompt": turn, "chosen": [{"role": "assistant", "content": "a"}]}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**row, "rejected": [{"role": "assistant", "content": "b"}]}) + "\n")
    data = config_for(tmp_path, path).data
    report = load_groups(data, "train", tokenizer)[1]()
    assert report["turn_marks_in_messages"] == {"<|im_end|>": 1, "<|im_start|>": 1}
    (line,) = [x for x in findings(report) if "rendered into them" in x]
    assert line.startswith("1 of 1 examples are conversations whose messages hold <|im_")


def test_both_ways_are_cached_apart(folder, tokenizer):
    tree = {"data": {"dataset_name": str(folder / "rows.jsonl")}, "objective": {"loss_type": "dpo"}}
    shown(folder)
    of_letters = make_config(folder, {"model": {"model_name_or_path": str(folder)}, **tree}).data
    of_tokens = of_letters.model_copy(update={"text_holds_special_tokens": True})
    counts = [load_groups(x, "train", tokenizer)[0].counts.lengths.sum() for x in (of_letters, of_tokens)]
    assert counts[0] > 2 * counts[1]
