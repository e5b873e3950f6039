"""From text to tokens: specials, templates, truncation."""

from __future__ import annotations

import pytest
from text_cases import CHAT, assistant, preference, user

from madpo.trainer.data.tokenise import TokenRules, tokenise
from madpo.trainer.formats.text_groups import to_group


def test_plain_text_gets_bos_and_eos_and_completions_start_after_the_prompt(tokenizer):
    group = tokenise(
        preference(prompt="a film:", chosen=" good", rejected=" bad plot"),
        tokenizer,
        TokenRules(64),
    )
    assert group.prompt[0] == tokenizer.bos_token_id
    assert tokenizer.decode(group.prompt[1:]) == "a film:"
    assert [tokenizer.decode(c) for c in group.completions] == [" good<eos>", " bad plot<eos>"]
    assert group.boundary_cut == 0 and not group.problem


def test_append_eos_is_explicit(tokenizer):
    group = preference(prompt="a:", chosen=" good", rejected=" bad")
    rules = {TokenRules(64): True, TokenRules(64, "always"): True, TokenRules(64, "never"): False}
    for rule, ends in rules.items():
        tokens = tokenise(group, tokenizer, rule)
        assert (tokens.completions[0][-1] == tokenizer.eos_token_id) is ends


def test_a_prompt_whose_last_token_merges_is_cut_at_the_common_prefix_and_counted(tokenizer):
    """`go` + `od` becomes one token `good`, so the prompt's own last tokens are not in the whole."""
    alone = tokenizer("a go")["input_ids"]
    whole = tokenizer("a good")["input_ids"]
    shared = sum(1 for x, y in zip(alone, whole, strict=False) if x == y)
    assert shared < len(alone), "the tokenizer must merge here for this to prove anything"
    group = tokenise(preference(prompt="a go", chosen="od", rejected="od dull"), tokenizer, TokenRules(64))
    assert group.prompt == whole[:shared]
    assert group.boundary_cut == len(alone) - shared
    for completion, text in zip(group.completions, ("a good<eos>", "a good dull<eos>"), strict=True):
        assert tokenizer.decode(group.prompt[1:] + completion) == text


def test_special_tokens_spelled_out_in_text_stay_text(tokenizer):
    group = tokenise(preference(prompt="a:", chosen=" <eos> b", rejected=" c"), tokenizer, TokenRules(64))
    assert group.completions[0].count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(group.completions[0][:-1]) == " <eos> b"


def test_chat_template_is_applied_and_ends_the_completion_itself(tokenizer):
    tokenizer.chat_template = CHAT
    group = preference(prompt=[user("film?")], chosen=[assistant("good")], rejected=[assistant("bad")])
    tokens = tokenise(group, tokenizer, TokenRules(64))
    assert tokenizer.decode(tokens.prompt) == "<user>film?</user><assistant>"
    assert tokenizer.decode(tokens.completions[0]) == "good</assistant>"


def test_conversations_without_a_template_say_what_to_do(tokenizer):
    group = preference(prompt=[user("film?")], chosen=[assistant("good")], rejected=[assistant("bad")])
    with pytest.raises(ValueError, match="no chat template"):
        tokenise(group, tokenizer, TokenRules(64))


def test_a_prompt_that_ends_in_the_assistants_words_is_continued(tokenizer):
    tokenizer.chat_template = CHAT
    prompt = [user("film?"), assistant("It is")]
    group = preference(prompt=prompt, chosen=[assistant(" good")], rejected=[assistant(" bad")])
    tokens = tokenise(group, tokenizer, TokenRules(64))
    assert tokenizer.decode(tokens.prompt) == "<user>film?</user><assistant>It is"
    assert tokenizer.decode(tokens.completions[0]) == " good</assistant>"


def test_completions_are_cut_at_max_length_and_prompts_that_fill_it_are_refused(tokenizer):
    group = preference(prompt="a film:", chosen=" good " * 20, rejected=" bad")
    tokens = tokenise(group, tokenizer, TokenRules(16))
    assert len(tokens.prompt) + len(tokens.completions[0]) == 16
    assert tokens.truncated == 1
    long = tokenise(preference(prompt="film " * 30, chosen=" a", rejected=" b"), tokenizer, TokenRules(16))
    assert long.problem == "prompt fills max_length"


def test_pairs_that_become_equal_by_truncation_are_refused(tokenizer):
    group = preference(prompt="a:", chosen=" the one film good", rejected=" the one film bad")
    assert not tokenise(group, tokenizer, TokenRules(64)).problem
    assert "same tokens" in tokenise(group, tokenizer, TokenRules(5)).problem


THINKING = """{% for m in messages %}<{{ m.role }}>
{%- if m.reasoning %}({{ m.reasoning }}){% endif %}{{ m.content }}{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""


def test_thinking_before_the_words_that_a_completion_goes_on_with_stays_before_them(tokenizer):
    tokenizer.chat_template = THINKING
    begun = {**assistant("It is"), "reasoning": "so", "prefix": True, "id": "a"}
    rest = {**assistant(" good"), "id": "b"}
    group = preference(prompt=[user("film?"), begun], chosen=[rest], rejected=[assistant(" bad")])
    tokens = tokenise(group, tokenizer, TokenRules(200))
    assert tokenizer.decode(tokens.prompt) == "<user>film?<assistant>(so)It is"
    assert list(map(tokenizer.decode, tokens.completions)) == [" good", " bad"]
    tokenizer.chat_template = CHAT
    with pytest.raises(ValueError, match="leaves out reasoning of the completion's message 1"):
        tokenise(group, tokenizer, TokenRules(200))


@pytest.mark.parametrize("key", ["reasoning", "thinking", "mood"])
def test_a_completion_that_goes_on_has_no_other_thinking(tokenizer, key):
    tokenizer.chat_template = THINKING
    begun, rest, bad = assistant("It is"), {**assistant(" good"), key: "why"}, assistant(" bad")
    prompt = [user("film?"), {**begun, key: "so"}]
    with pytest.raises(ValueError, match=f"^{key}: .* the two disagree, got 'so' and 'why'"):
        tokenise(preference(prompt=prompt, chosen=[rest], rejected=[bad]), tokenizer, TokenRules(200))
    group = preference(prompt=[user("film?"), begun], chosen=[rest], rejected=[bad])
    if key != "mood":  # which the template does not know
        with pytest.raises(ValueError, match=f"^{key}: .* thinking comes before its words, got 'why'"):
            tokenise(group, tokenizer, TokenRules(200))


LOOK = [user("film?"), assistant("Let me look.")]


def test_two_answers_in_a_row_of_one_conversation_are_two_messages(tokenizer):
    tokenizer.chat_template = CHAT
    whole = preference(chosen=[*LOOK, assistant("good")], rejected=[*LOOK, assistant("bad")])
    tokens = tokenise(whole, tokenizer, TokenRules(200))
    prompt = "<user>film?</user><assistant>Let me look.</assistant><assistant>"
    assert tokenizer.decode(tokens.prompt) == prompt
    assert list(map(tokenizer.decode, tokens.completions)) == ["good</assistant>", "bad</assistant>"]
    parted = preference(prompt=LOOK, chosen=[assistant("good")], rejected=[assistant("bad")])
    assert (
        tokenizer.decode(tokenise(parted, tokenizer, TokenRules(200)).prompt)
        == prompt.split("</assistant>")[0]
    )


def test_messages_read_alike_with_weights_and_without(tokenizer):
    tokenizer.chat_template = CHAT
    read = [
        tokenise(to_group({"messages": messages}, "messages"), tokenizer, TokenRules(200, supervised=True))
        for messages in ([*LOOK, assistant("good")], [{**x, "weight": 1} for x in [*LOOK, assistant("good")]])
    ]
    assert read[0].prompt + read[0].completions[0] == read[1].prompt + read[1].completions[0]
    last, both = read[0].completions[0], read[1]
    assert tokenizer.decode(last) == "good</assistant>"
    scored = [x for x, is_scored in zip(both.completions[0], both.masks[0], strict=True) if is_scored]
    assert tokenizer.decode(scored) == "Let me look.</assistant>good</assistant>"
