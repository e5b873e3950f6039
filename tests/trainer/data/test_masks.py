"""A completion of several messages is scored where the assistant speaks: masks by hand, in five families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import make_config, run_ranks, save_model
from plain import compare, plain_steps, zero3_steps
from turn_templates import AGENT, PARTING, asks, calls, conversations, gives, says, scored_text, tokenizers

from madpo.trainer.data.tokenise import TokenGroup, TokenRules, tokenise
from madpo.trainer.errors import UserError
from madpo.trainer.formats.adapters import ADAPTERS
from madpo.trainer.formats.read_row import RowRules, read_row


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> dict[str, Any]:
    return tokenizers(tmp_path_factory.mktemp("turns"))


def tokens(tokenizer: Any, row: dict[str, Any], **rules: Any) -> TokenGroup:
    group = read_row(row, ADAPTERS["messages" if "messages" in row else "preference"], RowRules())
    return tokenise(group, tokenizer, TokenRules(2000, **rules))


OF_TURNS = {
    "chatml": (
        "[good<|im_end|>\n]<|im_start|>user\ngo?<|im_end|>\n<|im_start|>assistant\n[great<|im_end|>\n]",
        "[bad<|im_end|>\n]<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n[dull<|im_end|>\n]"
        "<|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\n[end<|im_end|>\n]",
    ),
    "qwen": (
        "[good<|im_end|>\n]<|im_start|>user\ngo?<|im_end|>\n<|im_start|>assistant\n"
        "[<think>\n\n</think>\n\ngreat<|im_end|>\n]",
        "[bad<|im_end|>\n]<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n[dull<|im_end|>\n]"
        "<|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\n[<think>\n\n</think>\n\nend<|im_end|>\n]",
    ),
    "llama": (
        "[good<|eot_id|>]<|start_header_id|>user<|end_header_id|>\n\ngo?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[great<|eot_id|>]",
        "[bad<|eot_id|>]<|start_header_id|>user<|end_header_id|>\n\nwhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[dull<|eot_id|>]"
        "<|start_header_id|>user<|end_header_id|>\n\nso?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[end<|eot_id|>]",
    ),
    "gemma": (
        "[good<end_of_turn>\n]<start_of_turn>user\ngo?<end_of_turn>\n<start_of_turn>model\n[great<end_of_turn>\n]",
        "[bad<end_of_turn>\n]<start_of_turn>user\nwhy?<end_of_turn>\n<start_of_turn>model\n[dull<end_of_turn>\n]"
        "<start_of_turn>user\nso?<end_of_turn>\n<start_of_turn>model\n[end<end_of_turn>\n]",
    ),
    "deepseek": (
        "[good<|eos|>]<|User|>go?<|Assistant|>[great<|eos|>]",
        "[bad<|eos|>]<|User|>why?<|Assistant|>[dull<|eos|>]<|User|>so?<|Assistant|>[end<|eos|>]",
    ),
    "channels": (
        "[<|message|>good<|end|>]<|start|>user<|message|>go?<|end|><|start|>assistant"
        "[<|message|>great<|return|>]",
        "[<|message|>bad<|end|>]<|start|>user<|message|>why?<|end|><|start|>assistant"
        "[<|message|>dull<|end|>]<|start|>user<|message|>so?<|end|><|start|>assistant"
        "[<|message|>end<|return|>]",
    ),
    "generating": (
        "[good<turn|>\n]<|turn>user\ngo?<turn|>\n<|turn>assistant\n[great<turn|>\n]",
        "[bad<turn|>\n]<|turn>user\nwhy?<turn|>\n<|turn>assistant\n[dull<turn|>\n]"
        "<|turn>user\nso?<turn|>\n<|turn>assistant\n[end<turn|>\n]",
    ),
}


@pytest.mark.parametrize("name", OF_TURNS)
def test_conversations_that_part_in_the_middle_are_scored_where_the_assistant_speaks(known, name):
    group = tokens(known[name], PARTING)
    assert tuple(scored_text(known[name], group)) == OF_TURNS[name]
    assert group.boundary_cut == 0 and not group.problem


OF_TOOLS = {
    "chatml": (
        '[<call>{"name": "find", "arguments": {"q": "film", "k": 3}}</call><|im_end|>\n]'
        "<|im_start|>tool\na plot<|im_end|>\n<|im_start|>tool\nassistant\n<|im_end|>\n"
        "<|im_start|>assistant\n[good<|im_end|>\n]",
        '[<call>{"name": "find", "arguments": {}}</call><|im_end|>\n]<|im_start|>tool\n<|im_end|>\n'
        "<|im_start|>assistant\n[bad<|im_end|>\n]",
    ),
    "qwen": (
        '[<tool_call>\n{"name": "find", "arguments": {"q": "film", "k": 3}}\n</tool_call><|im_end|>\n]'
        "<|im_start|>user\n<tool_response>\na plot\n</tool_response>\n<tool_response>\nassistant\n\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\n[<think>\n\n</think>\n\ngood<|im_end|>\n]",
        '[<tool_call>\n{"name": "find", "arguments": {}}\n</tool_call><|im_end|>\n]'
        "<|im_start|>user\n<tool_response>\n\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n[<think>\n\n</think>\n\nbad<|im_end|>\n]",
    ),
    "llama": (
        '[{"name": "find", "parameters": {"q": "film", "k": 3}}<|eot_id|>]'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"a plot"<|eot_id|>'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"assistant\\n"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n[good<|eot_id|>]",
        '[{"name": "find", "parameters": {}}<|eot_id|>]'
        '<|start_header_id|>ipython<|end_header_id|>\n\n""<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n[bad<|eot_id|>]",
    ),
    "deepseek": (
        '[<|calls|><|call|>find\n{"q": "film", "k": 3}<|calls_end|><|eos|>]<|outputs|><|output|>a plot'
        "<|output|>assistant\n<|outputs_end|>[good<|eos|>]",
        "[<|calls|><|call|>find\n{}<|calls_end|><|eos|>]<|outputs|><|output|><|outputs_end|>[bad<|eos|>]",
    ),
    "channels": (
        '[ to=find<|message|>{"q": "film", "k": 3}<|call|>]<|start|>tool<|message|>a plot<|end|>'
        "<|start|>tool<|message|>assistant\n<|end|><|start|>assistant[<|message|>good<|return|>]",
        "[ to=find<|message|>{}<|call|>]<|start|>tool<|message|><|end|>"
        "<|start|>assistant[<|message|>bad<|return|>]",
    ),
    "generating": (
        '[<call>{"name": "find", "arguments": {"q": "film", "k": 3}}</call>]<result>a plot</result>'
        "<result>assistant\n</result><|turn>assistant\n[good<turn|>\n]",
        '[<call>{"name": "find", "arguments": {}}</call>]<result></result><|turn>assistant\n[bad<turn|>\n]',
    ),
}


@pytest.mark.parametrize("name", OF_TOOLS)
def test_results_of_tools_are_context(known, name):
    assert tuple(scored_text(known[name], tokens(known[name], AGENT))) == OF_TOOLS[name]


@pytest.mark.parametrize("name", OF_TURNS)
def test_a_prompt_may_end_with_an_answer_and_the_completion_begin_with_the_next_question(known, name):
    row = {
        "prompt": PARTING["chosen"][:2],
        "chosen": [asks("go?"), says("great")],
        "rejected": [asks("so?"), says("end")],
    }
    texts = scored_text(known[name], tokens(known[name], row))
    for text, question, answer in zip(texts, ("go?", "so?"), ("great", "end"), strict=True):
        before, said = text.split("[")
        assert question in before and answer in said and said.endswith("]")


def test_what_stands_between_the_channels_of_an_answer_is_scored(known):
    """The model itself ends one channel and begins the next."""
    row = {"prompt": [asks("on?")], "chosen": [says("a"), asks("so?"), says("good", thinking="by plot")]}
    texts = scored_text(known["channels"], tokens(known["channels"], {**row, "rejected": [says("bad")]}))
    assert texts == [
        "[<|message|>a<|end|>]<|start|>user<|message|>so?<|end|><|start|>assistant"
        "[<|think|>by plot<|end|><|start|>assistant<|message|>good<|return|>]",
        "[<|message|>bad<|return|>]",
    ]


def test_thinking_that_the_template_keeps_is_scored_and_what_it_drops_makes_a_bad_row(known):
    tokenizer, thought = known["qwen"], "<think>\nby plot\n</think>\n\n"
    calling = {**calls("find", q="film"), "reasoning_content": "first"}
    row = {"prompt": [asks("on?")], "chosen": [calling, gives("a"), says(thought + "good")]}
    (text, _) = scored_text(tokenizer, tokens(tokenizer, {**row, "rejected": [says("bad")]}))
    assert text.startswith("[<think>\nfirst\n</think>\n\n<tool_call>")
    assert text.endswith("assistant\n[<think>\nby plot\n</think>\n\ngood<|im_end|>\n]")
    turns = [says(thought + "good"), asks("go?"), says("great")]
    with pytest.raises(UserError, match="thinking of the completion's message 1"):
        tokens(tokenizer, {**PARTING, "chosen": [asks("on?"), *turns]})
    turns[0]["weight"] = 0  # it is context then, as in a prompt
    group = tokens(tokenizer, {**PARTING, "chosen": [asks("on?"), *turns]})
    assert group.notes == ("thinking of earlier answers left out by the template",)
    text = scored_text(tokenizer, group)[0]
    assert text.count("[") == 1 and text.endswith("[<think>\n\n</think>\n\ngreat<|im_end|>\n]")


def test_a_later_turn_that_changes_the_prompt_moves_it_into_the_completion_unscored(known):
    """The thinking before a tool's result goes once the user asks again: only that side reads it so."""
    calling = {**calls("find", q="film"), "reasoning_content": "first"}
    prompt = [asks("on?"), calling, gives("a plot")]
    row = {"prompt": prompt, "chosen": [says("good"), asks("go?"), says("great")], "rejected": [says("bad")]}
    group = tokens(known["qwen"], row)
    prompt, texts = known["qwen"].decode(group.prompt), scored_text(known["qwen"], group)
    asked = "<|im_start|>user\non?<|im_end|>\n<|im_start|>assistant\n"
    found = (
        '<tool_call>\n{"name": "find", "arguments": {"q": "film"}}\n</tool_call><|im_end|>\n<|im_start|>user'
    )
    found += "\n<tool_response>\na plot\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert [prompt + text for text in texts] == [
        f"{asked}{found}[good<|im_end|>\n]<|im_start|>user\ngo?<|im_end|>\n<|im_start|>assistant\n"
        "[<think>\n\n</think>\n\ngreat<|im_end|>\n]",
        f"{asked}<think>\nfirst\n</think>\n\n{found}[<think>\n\n</think>\n\nbad<|im_end|>\n]",
    ]
    assert group.boundary_cut == 0  # nothing has merged


def test_an_answer_that_changes_the_prompt_moves_it_into_the_completion_unscored(known):
    """What the tool has given would be taught otherwise, since tokens differ before it."""
    prompt = [asks("on?"), {**calls("find", q="x"), "thinking": "first"}, gives("a plot")]
    row = {"prompt": prompt, "chosen": [says("good")], "rejected": [says("bad")]}
    group = tokens(known["channels"], row)
    assert known["channels"].decode(group.prompt).endswith("on?<|end|><|start|>assistant")
    call = ' to=find<|message|>{"q": "x"}<|call|><|start|>tool<|message|>a plot<|end|><|start|>assistant'
    assert scored_text(known["channels"], group) == [
        f"{call}[<|message|>{word}<|return|>]" for word in ("good", "bad")
    ]
    assert group.boundary_cut == 0 and "thinking of earlier answers left out by the template" in group.notes


def test_a_generation_prompt_that_says_more_than_the_header_does_not_take_the_answers_letters(known):
    row = {**AGENT, "rejected": [says("bad")]}
    group = tokens(known["qwen"], row, template_kwargs={"enable_thinking": False})
    texts = scored_text(known["qwen"], group)
    assert known["qwen"].decode(group.prompt).endswith("assistant\n") and texts[0].startswith(
        "[<tool_call>\n"
    )
    assert texts[1] == "<think>\n\n</think>\n\n[bad<|im_end|>\n]"


@pytest.mark.parametrize("name", OF_TURNS)
def test_an_answer_that_is_continued_is_scored_from_there(known, name):
    """Also by Qwen, which writes it after empty thinking where nothing follows, and without where it does."""
    row = {"prompt": [asks("on?"), says("It")], "chosen": [says(" is"), asks("go?"), says("great")]}
    group = tokens(known[name], {**row, "rejected": [says(" was")]})
    prompt, texts = known[name].decode(group.prompt), scored_text(known[name], group)
    for text, word in zip(texts, (" is", " was"), strict=True):
        before, said = (prompt + text).split("[", 1)
        assert before.endswith("It") and said.startswith(f"{word}<")


@pytest.mark.parametrize("name", OF_TURNS)
def test_single_answers_are_whole_and_all_scores_everything(known, name):
    one = {"prompt": [asks("on?")], "chosen": [says("good")], "rejected": [says("bad")]}
    assert tokens(known[name], one) == tokens(known[name], one, train_on="all")
    everything = tokens(known[name], PARTING, train_on="all")
    assert everything.masks == []
    assert everything.completions == tokens(known[name], PARTING).completions


def test_weights_of_messages_leave_their_tokens_out(known):
    row: dict[str, Any] = {"prompt": [asks("on?")], "rejected": [says("bad")]}
    turns = [says("good", weight=0), asks("go?", weight=1), says("great", train=True)]
    group = tokens(known["chatml"], {**row, "chosen": turns})
    want = "good<|im_end|>\n<|im_start|>user\ngo?<|im_end|>\n<|im_start|>assistant\n[great<|im_end|>\n]"
    assert scored_text(known["chatml"], group)[0] == want
    assert group.notes == (
        "weight 1 of a message that is not the assistant's: not trained on (data.train_on)",
    )


def test_with_all_a_weight_of_0_still_leaves_a_message_out_with_its_header(known):
    row = {
        "prompt": [asks("on?"), says("a")],
        "chosen": [asks("go?", weight=0), says("great")],
        "rejected": [asks("so?"), says("end", weight=0)],
    }
    assert scored_text(known["chatml"], tokens(known["chatml"], row, train_on="all")) == [
        "<|im_start|>user\ngo?<|im_end|>\n[<|im_start|>assistant\ngreat<|im_end|>\n]",
        "[<|im_start|>user\nso?<|im_end|>\n]<|im_start|>assistant\nend<|im_end|>\n",
    ]


def test_supervised_messages_with_weights_are_all_read(known):
    """Without weights the last message is the completion; with them, every answer that is not weighted 0."""
    talk = [asks("on?"), says("a"), asks("so?"), says("b"), asks("go?"), says("c")]
    assert scored_text(known["chatml"], tokens(known["chatml"], {"messages": talk})) == ["[c<|im_end|>\n]"]
    talk[1]["weight"] = 0
    (text,) = scored_text(known["chatml"], tokens(known["chatml"], {"messages": talk}))
    assert text.startswith("[b<|im_end|>\n]<") and text.endswith("[c<|im_end|>\n]")
    talk[5]["weight"] = 0
    (text,) = scored_text(known["chatml"], tokens(known["chatml"], {"messages": talk}))
    assert text.startswith("[b<|im_end|>\n]<") and text.endswith("assistant\nc<|im_end|>\n")


def test_an_end_that_is_appended_and_one_that_is_cut_off(known):
    tokenizer = known["llama"]
    row = {"prompt": [asks("on?")], "chosen": [says("a"), asks("go?"), says("b")], "rejected": [says("c")]}
    texts = scored_text(tokenizer, tokens(tokenizer, row, append_eos="always"))
    assert texts[0].endswith("[b<|eot_id|><eos>]") and texts[1] == "[c<|eot_id|><eos>]"
    row["chosen"][2]["weight"] = 0
    assert scored_text(tokenizer, tokens(tokenizer, row, append_eos="always"))[0].endswith(
        "\n\nb<|eot_id|><eos>"
    )
    whole, prompt = tokens(tokenizer, row), [asks("on?"), says("x")]
    long = {"prompt": prompt, "chosen": [asks("go?"), says("b")], "rejected": [asks("so?"), says("c")]}
    short = TokenRules(len(tokens(tokenizer, long).prompt) + 8)
    group = tokenise(read_row(long, ADAPTERS["preference"], RowRules()), tokenizer, short)
    assert not whole.problem and group.problem == "no token of a completion is scored"


MOVES = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}|{% endif %}{% endfor %}{% for m in "
MOVES += "messages %}{% if m.role == 'assistant' %}<{{ m.content }}>{% endif %}{% endfor %}"


ENDS_WITH_ANSWERS = """{% if messages[-1].role != 'assistant' and not add_generation_prompt %}
{{- raise_exception('no answer') }}{% endif %}
{%- for m in messages %}{{ '<' ~ m.role ~ '>' ~ m.content ~ '</>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""


def test_a_template_that_refuses_a_part_of_the_conversation_is_one_line(known, monkeypatch):
    monkeypatch.setattr(known["gemma"], "chat_template", ENDS_WITH_ANSWERS)
    group = tokens(known["gemma"], PARTING)
    assert scored_text(known["gemma"], group)[0] == "[good</>]<user>go?</><assistant>[great</>]"
    row = {**PARTING, "chosen": [*PARTING["chosen"][:3], says("a", weight=0)]}
    with pytest.raises(UserError, match=r"message 3 .*, as it refuses a part of them \(no answer\)"):
        tokens(known["gemma"], row, train_on="all")


def test_what_does_not_show_is_refused(known, monkeypatch):
    tokenizer = known["gemma"]
    monkeypatch.setattr(tokenizer, "chat_template", MOVES)
    with pytest.raises(UserError, match=r"does not show which tokens are those of message \d.*train_on=all"):
        tokens(tokenizer, PARTING)
    assert not tokens(tokenizer, PARTING, train_on="all").masks
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(UserError, match="a completion of several messages needs a fast tokenizer"):
        tokens(tokenizer, PARTING)


@pytest.mark.ranks
def test_masked_conversations_packed_on_two_ranks_train_as_single_rows_do(tmp_path, known):
    known["chatml"].save_pretrained(tmp_path / "tokenizer")
    size = len(known["chatml"])
    names = {
        role: str(save_model(tmp_path / role, tmp_path / "tokenizer", seed=seed, vocab_size=size))
        for role, seed in (("model_name_or_path", 1), ("ref_model_name_or_path", 2))
    }
    config = make_config(
        tmp_path,
        {
            "model": names,
            "data": {"dataset_name": str(conversations(tmp_path)), "max_length": 120},
            "objective": {"loss_type": "ipo"},  # of the mean over a completion's scored tokens
            "train": {"global_batch_size": 4},
        },
    )
    compare(run_ranks(2, zero3_steps, config, 1)[0], plain_steps(config, 1))


AGREE = ("cohere", "gemma3", "glm4moe", "lfm2_v2", "llama3", "qwen3", "qwen3_instruct_2507")
"""TRL's templates whose marks of what is generated leave out all that the generation prompt says."""


@pytest.mark.parametrize("name", AGREE)
def test_masks_are_those_of_trls_templates_that_mark_what_is_generated(known, name, monkeypatch):
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    tokenizer, rows = known["chatml"], [PARTING, AGENT]
    monkeypatch.setattr(tokenizer, "chat_template", (folder / f"{name}_training.jinja").read_text())
    for row in rows[: 2 if name in ("glm4moe", "lfm2_v2") or "qwen" in name else 1]:
        group = tokens(tokenizer, {**row, "tools": []})
        for side, completion, mask in zip(
            ("chosen", "rejected"), group.completions, group.whole_masks, strict=True
        ):
            encoded = tokenizer.apply_chat_template(
                row.get("prompt", []) + row[side], return_dict=True, return_assistant_tokens_mask=True
            )
            assert encoded["input_ids"] == group.prompt + completion
            assert list(map(bool, encoded["assistant_masks"])) == [False] * len(group.prompt) + mask


ENDS_BETWEEN = """{% for m in messages %}{{ '[' ~ m.role ~ ']' ~ m.content }}
{%- if not loop.last %}{{ 'END' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'OPEN[assistant]' }}{% endif %}"""


@pytest.mark.parametrize("end", ["<|im_end|>", "[end]", "<eos>"])
@pytest.mark.parametrize("opening", ["", "END"])
def test_an_end_that_is_written_only_where_another_turn_follows(known, monkeypatch, end, opening):
    tokenizer = known["chatml"]
    template = ENDS_BETWEEN.replace("OPEN", opening).replace("END", end)
    monkeypatch.setattr(tokenizer, "chat_template", template)
    one = {"prompt": [asks("on?")], "chosen": [says("good")], "rejected": [says("bad")]}
    group, several = tokens(tokenizer, one), tokens(tokenizer, PARTING)
    read = [tokenizer.decode(group.prompt) + text for text in scored_text(tokenizer, group)]
    assert read[0] == f"[user]on?{end}[assistant][good]"
    read = [tokenizer.decode(several.prompt) + text for text in scored_text(tokenizer, several)]
    assert read[0] == f"[user]on?{end}[assistant][good{end}][user]go?{end}[assistant][great]"


def test_blanks_between_turns_belong_to_none(known, monkeypatch):
    template = ENDS_BETWEEN.replace("OPEN", "\\n\\n").replace("END", "\\n\\n")
    monkeypatch.setattr(known["chatml"], "chat_template", template)
    (text, _) = scored_text(known["chatml"], tokens(known["chatml"], PARTING))
    assert text == "[good]\n\n[user]go?\n\n[assistant][great]"
