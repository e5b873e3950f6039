"""Token groups at their edges: where a completion starts and ends, what counts, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from harness import WORDS
from transformers import AutoTokenizer

from madpo.trainer.data.plain_text import special_spellings, spells_special
from madpo.trainer.data.tokenise import TokenRules, encode_prompt, labels_of, tokenise
from madpo.trainer.formats.text_groups import TextGroup

CHAT = (
    "{% if tools %}[{{ tools[0]['name'] }}]{% endif %}{{ tone }}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% elif messages[-1]['role'] == 'assistant' %}<eos>{% endif %}"
)


@pytest.fixture
def tokenizer(tokenizer_folder) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def pair(prompt: Any, chosen: Any, rejected: Any, **fields: Any) -> TextGroup:
    return TextGroup(prompt, [chosen, rejected], [(0, 1, 1.0)], **fields)


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def asked(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("merging_first", [False, True])
def test_the_boundary_is_where_the_first_completion_to_merge_with_the_prompt_puts_it(
    tokenizer, merging_first
):
    """`go` + `od` is one token, `go` + ` plot` is not: the prompt ends before `go` for both."""
    texts = [" plot", "od"]
    alone = tokenizer("a go")["input_ids"]
    assert tokenizer("a go plot")["input_ids"][: len(alone)] == alone
    assert tokenizer("a good")["input_ids"][: len(alone)] != alone
    first, second = texts[::-1] if merging_first else texts
    group = tokenise(pair("a go", first, second), tokenizer, TokenRules(64))
    for completion, text in zip(group.completions, (first, second), strict=True):
        assert tokenizer.decode(group.prompt[1:] + completion) == f"a go{text}<eos>"
    assert len(group.prompt) < len(alone) and group.boundary_cut == len(alone) - len(group.prompt)


@pytest.mark.parametrize("append", ["auto", "always", "never"])
def test_a_template_that_ends_with_the_end_of_the_sequence_gets_no_second_one(tokenizer, append):
    tokenizer.chat_template = CHAT
    group = pair(asked("film?"), said("good"), said("bad plot"))
    for completion in tokenise(group, tokenizer, TokenRules(64, append)).completions:
        assert completion.count(tokenizer.eos_token_id) == 1 and completion[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(("append", "ends"), [("auto", False), ("always", True), ("never", False)])
def test_a_template_without_an_end_of_the_sequence_gets_one_only_if_asked(tokenizer, append, ends):
    tokenizer.chat_template = CHAT.replace("<eos>", "")
    tokens = tokenise(pair(asked("film?"), said("good"), said("bad")), tokenizer, TokenRules(64, append))
    assert [x[-1] == tokenizer.eos_token_id for x in tokens.completions] == [ends, ends]


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(tokenizer):
    """Whether a completion ends is what `append_eos` says, not the tokenizer."""
    from tokenizers.processors import TemplateProcessing

    group, rules = pair("a film:", " good", " bad"), TokenRules(64)
    appends: tuple[Any, ...] = ("auto", "never")
    want = {append: tokenise(group, tokenizer, TokenRules(64, append)) for append in appends}
    special = [("<bos>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
    closing: Any = TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = closing
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in encode_prompt(group, tokenizer, rules)[0]
    assert want == {append: tokenise(group, tokenizer, TokenRules(64, append)) for append in appends}


def test_the_length_of_a_group_to_the_token(tokenizer):
    """A completion that just fits is whole, one token less and it lost its end; a prompt that leaves one
    token is trained on, one that leaves none is not."""
    group = pair("a film:", " good plot and story", " bad")
    whole = tokenise(group, tokenizer, TokenRules(64))
    prompt, longest = len(whole.prompt), max(map(len, whole.completions))
    fits = tokenise(group, tokenizer, TokenRules(prompt + longest))
    assert fits == whole and fits.truncated == 0
    cut = tokenise(group, tokenizer, TokenRules(prompt + longest - 1))
    assert cut.truncated == 1 and cut.completions == [whole.completions[0][:-1], whole.completions[1]]
    one = tokenise(group, tokenizer, TokenRules(prompt + 1))
    assert [len(x) for x in one.completions] == [1, 1] and one.truncated == 2 and not one.problem
    assert tokenise(group, tokenizer, TokenRules(prompt)).problem == "prompt fills max_length"


def test_edges_between_equal_tokens_are_left_out_and_counted(tokenizer):
    group = TextGroup("a:", [" good", " good", " bad"], [(0, 1, 1.0), (0, 2, 2.0), (1, 2, 3.0)])
    tokens = tokenise(group, tokenizer, TokenRules(64))
    assert tokens.edges == [(0, 2, 2.0), (1, 2, 3.0)] and tokens.equal == 1 and not tokens.problem
    assert tokens.labels == [1, 1, -1]
    same = tokenise(pair("a:", " good", " good"), tokenizer, TokenRules(64))
    assert (same.edges, same.equal, same.problem) == ([], 1, "chosen and rejected are the same tokens")


def test_labels_of_edges_by_hand():
    """Desirable is what wins more often than it loses."""
    edges: list[Any] = [(0, 1, None), (0, 2, None), (1, 2, None), (3, 0, None), (2, 4, None)]
    assert labels_of(edges, 6) == [1, 0, -1, 1, -1, 0]
    assert labels_of([], 3) == []


def test_labels_that_rows_bring_stay_theirs(tokenizer):
    group = TextGroup("a:", [" good"], [], [-1])
    assert tokenise(group, tokenizer, TokenRules(64)).labels == [-1]
    refused = tokenise(group, tokenizer, TokenRules(64, supervised=True))
    assert refused.problem == "labelled undesirable, and this objective imitates"
    assert not tokenise(
        TextGroup("a:", [" good"], [], [1]), tokenizer, TokenRules(64, supervised=True)
    ).problem


def test_an_empty_completion_without_an_end_has_no_tokens(tokenizer):
    group = pair("a:", " good", "")
    assert tokenise(group, tokenizer, TokenRules(64, "never")).problem == "a completion has no tokens"
    assert tokenise(group, tokenizer, TokenRules(64)).completions[1] == [tokenizer.eos_token_id]


def test_plain_text_without_a_beginning_is_predicted_from_its_first_token(tokenizer):
    """Only alone and without a prompt: of two completions no token is shared."""
    with_bos = tokenise(TextGroup("", ["good plot"], []), tokenizer, TokenRules(64))
    assert with_bos.prompt == [tokenizer.bos_token_id]
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.bos_token = None
    text = tokenise(TextGroup("", ["good plot"], []), tokenizer, TokenRules(64))
    ids = tokenizer("good plot")["input_ids"]
    assert text.prompt == ids[:1] and text.completions == [[*ids[1:], tokenizer.eos_token_id]]
    assert not text.problem
    no_prompt = "prompt and completion merge into one token"
    assert tokenise(pair("", "good", "plot"), tokenizer, TokenRules(64)).problem == no_prompt


def test_a_rows_own_template_variables_come_before_those_of_all(tokenizer):
    tokenizer.chat_template = CHAT
    rules = TokenRules(64, template_kwargs={"tone": "warm"})

    def text(**fields: Any) -> str:
        tokens = tokenise(pair(asked("film?"), said("good"), said("bad"), **fields), tokenizer, rules)
        return tokenizer.decode(tokens.prompt)

    assert text() == "warm<user>film?<assistant>"
    assert text(template_kwargs={"tone": "cold"}) == "cold<user>film?<assistant>"
    assert text(tools=[{"name": "look"}]) == "[look]warm<user>film?<assistant>"


def test_a_conversation_that_begins_twice_is_refused(tokenizer):
    tokenizer.chat_template = "<bos><bos>" + CHAT
    with pytest.raises(ValueError, match="begins with <bos> twice"):
        tokenise(pair(asked("film?"), said("good"), said("bad")), tokenizer, TokenRules(64))
    tokenizer.chat_template = "<bos>" + CHAT
    tokens = tokenise(pair(asked("film?"), said("good"), said("bad")), tokenizer, TokenRules(64))
    assert tokens.prompt.count(tokenizer.bos_token_id) == 1


def test_a_prompt_of_the_assistants_own_words_is_continued_by_the_assistant_only(tokenizer):
    tokenizer.chat_template = CHAT
    group = pair([*asked("film?"), *said("It is")], said(" good"), said(" bad"))
    tokens = tokenise(group, tokenizer, TokenRules(64))
    whole = [tokenizer.decode(tokens.prompt + x) for x in tokens.completions]
    assert whole == ["<user>film?<assistant>It is good<eos>", "<user>film?<assistant>It is bad<eos>"]
    assert tokens.boundary_cut == 0
    wrong = [{"role": "tool", "content": "x"}, *said("good")]
    with pytest.raises(ValueError, match="the prompt ends with words of the assistant"):
        tokenise(pair(group.prompt, wrong, said("bad")), tokenizer, TokenRules(64))


def test_spelled_special_tokens_are_found_in_any_text_of_a_group(tokenizer):
    spellings = special_spellings(tokenizer)
    assert spellings is not None
    for group in (
        pair("a <eos>", " b", " c"),
        pair("a", " b<bos>", " c"),
        pair("a", " b", " <eos>"),
        pair(asked("<eos>"), said("b"), said("c")),
        pair(asked("a"), said("b"), said("<eos>")),
    ):
        assert spells_special(group, spellings) and not spells_special(group, None)
    calls = [{"role": "assistant", "tool_calls": [{"name": "look"}]}]
    for group in (pair("a", " b", " eos"), pair([*asked(" ".join(WORDS)), *calls], said("b"), said("c"))):
        assert not spells_special(group, spellings)
