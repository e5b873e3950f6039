"""Published files through to token groups and a training step: cache, tools, templates, groups of several."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import make_config, run_ranks, save_model, sentence
from plain import padded_logps, zero3_steps
from published_rows import NECTAR, SHAREGPT, TOOLS, ULTRAFEEDBACK, ULTRAFEEDBACK_BINARIZED, answer, user
from transformers import AutoTokenizer

from madpo.trainer.config.data import DataConfig
from madpo.trainer.config.schema import Config
from madpo.trainer.data import tokenised_cache
from madpo.trainer.data.groups import check_groups
from madpo.trainer.data.tokenise import TokenRules, tokenise
from madpo.trainer.data.tokenised_cache import groups_key, load_groups, rules_of
from madpo.trainer.data.training_data import load_data
from madpo.trainer.formats.adapters import ADAPTERS
from madpo.trainer.formats.read_row import RowRules, read_row
from madpo.trainer.formats.text_groups import TextGroup
from madpo.trainer.model.tokenizer import load_tokenizer

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% if short %}<short>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{% if m.content is defined %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }}{{ call.function.arguments | tojson }}]"
    "{% endfor %}</{{ m.role }}>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def config_for(folder: Path, path: Path, loss_type: str = "dpo", **data: Any) -> Config:
    tree = {
        "model": {"model_name_or_path": "unused"},
        "data": {"dataset_name": str(path), "max_length": 600, **data},
        "objective": {"loss_type": loss_type},
        "train": {"micro_batch_tokens": 1200},
    }
    return make_config(folder, tree)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PUBLISHED = [
    ("nectar", NECTAR, 7, 20),
    ("ultrafeedback", ULTRAFEEDBACK, 3, 3),
    ("ultrafeedback_binarized", ULTRAFEEDBACK_BINARIZED, 2, 1),
    ("sharegpt", SHAREGPT, 1, 0),
]


@pytest.mark.parametrize("adapter, row, completions, edges", PUBLISHED, ids=[x[0] for x in PUBLISHED])
def test_published_files_become_the_same_groups_from_json_lines_and_parquet(
    tmp_path, tokenizer, monkeypatch, adapter, row, completions, edges
):
    got = []
    for name in ("rows.jsonl", "rows.parquet"):
        config = config_for(tmp_path, write(tmp_path / name, [row, row]), adapter=adapter)
        groups, read = load_groups(config.data, "train", tokenizer)
        report = read()
        assert report["groups"] == 2 and not report["dropped"]
        got.append(groups[0])
        with monkeypatch.context() as patch:
            patch.setattr(tokenised_cache, "tokenise_all", None)  # the second time it is read from the cache
            assert load_groups(config.data, "train", tokenizer)[0][0] == got[-1]
    assert got[0] == got[1]
    assert (len(got[0].completions), len(got[0].edges)) == (completions, edges)


def test_whatever_decides_the_group_is_part_of_the_cache_key(tmp_path, tokenizer):
    row = {"prompt": "p:", "completions": [" a", " b", " c"], "scores": [1, 2, 3], "other": "q:"}
    path = write(tmp_path / "rows.jsonl", [row])
    changes: list[dict[str, Any]] = [
        {},
        {"edges": "adjacent"},
        {"edges": "best_worst"},
        {"columns": {"prompt": "other"}},
        {"adapter": "scored"},
        {"chat_template_kwargs": {"short": True}},
    ]
    loaded = [load_groups(config_for(tmp_path, path, **x).data, "train", tokenizer)[0] for x in changes]
    assert len({groups.fingerprint for groups in loaded}) == len(changes)
    assert [len(groups[0].edges) for groups in loaded] == [3, 2, 1, 3, 3, 3]
    assert tokenizer.decode(loaded[3][0].prompt[1:]) == "q:"


def test_the_order_of_columns_and_variables_is_no_part_of_the_cache_key(tokenizer):
    def key(columns: dict[str, str], variables: dict[str, Any]) -> str:
        return groups_key(
            "rows", tokenizer, rules_of(DataConfig(columns=columns, chat_template_kwargs=variables))
        )

    columns, variables = {"prompt": "q", "margin": "m"}, {"short": True, "more": {"a": 1, "b": [2]}}
    backwards = {"more": {"b": [2], "a": 1}, "short": True}
    assert key(columns, variables) == key(dict(reversed(columns.items())), backwards)
    assert key(columns, variables) != key(columns, {**variables, "short": False})


def test_an_adapter_of_no_name_is_refused_with_the_config(tmp_path):
    with pytest.raises(ValueError, match="unknown adapter, did you mean 'nectar'"):
        config_for(tmp_path, tmp_path, adapter="nectra")
    with pytest.raises(ValueError, match="tokenize: madpo sets this itself; give variables of the template"):
        config_for(tmp_path, tmp_path, chat_template_kwargs={"tokenize": False})


def test_ties_and_equal_completions_are_left_out_and_counted(tmp_path, tokenizer):
    rows = [
        {"prompt": "p:", "completions": [" a", " b"], "scores": [1, 1]},
        {"prompt": "p:", "completions": [" a", " a"], "scores": [1, 2]},
        {"prompt": "p:", "completions": [" a", " a", " b"], "scores": [1, 2, 3]},
    ]
    config = config_for(tmp_path, write(tmp_path / "rows.jsonl", rows))
    groups, read = load_groups(config.data, "train", tokenizer)
    report = read()
    assert report["dropped"] == {
        "chosen and rejected are the same tokens": 1,
        "no completion is better than another": 1,
    }
    assert report["comparisons_of_equal_tokens"] == groups[0].equal == 1
    assert groups[0].edges == [(2, 0, 2.0), (2, 1, 1.0)]
    best, _ = load_groups(config.data, "train", tokenizer, supervised=True)
    texts = [tokenizer.decode(best[i].completions[0]) for i in range(3)]
    assert texts == [" a<eos>", " a<eos>", " b<eos>"]


@pytest.mark.parametrize("on_bad_row", ["error", "drop"])
def test_fewer_than_two_scores_are_counted_and_refuse_nothing(tmp_path, tokenizer, on_bad_row):
    rows = [
        {"prompt": "p:", "completions": [" a", " b"], "scores": scores}
        for scores in ([1.0, 2.0], [None, 2.0], [None, None])
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    config = config_for(tmp_path, path, on_bad_row=on_bad_row)
    data = load_data(config, tokenizer, training=True)
    assert data.train is not None and len(data.train) == 1
    assert data.report["train"]["dropped"] == {"fewer than two scored completions": 2}
    best, read = load_groups(config_for(tmp_path, path, on_bad_row="drop").data, "train", tokenizer, True)
    report = read()
    assert [tokenizer.decode(best[i].completions[0]) for i in range(2)] == [" b<eos>"] * 2
    assert len(best) == 2 and report["dropped"] == {"unreadable": 1}, "without a score none is the best"
    with pytest.raises(ValueError, match=r"rows.jsonl:3: no completion has a score, and so none is the best"):
        load_groups(config_for(tmp_path, path).data, "train", tokenizer, supervised=True)


def test_single_completions_of_other_layouts_stay(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "p:", "completion": " a", "label": True}])
    groups, read = load_groups(config_for(tmp_path, path).data, "train", tokenizer)
    report = read()
    assert len(groups) == 1 and report["dropped"] == {}


def test_a_group_beyond_the_budget_is_refused_with_its_size(tmp_path, tokenizer):
    row = {"prompt": "p:", "completions": [" word" * 100 + x for x in "abcd"], "scores": [1, 2, 3, 4]}
    path = write(tmp_path / "rows.jsonl", [row])
    config = config_for(tmp_path, path)
    groups, _ = load_groups(config.data, "train", tokenizer)
    with pytest.raises(
        ValueError, match=rf"cannot hold a group of {groups.counts.lengths[0]} tokens.*best_worst"
    ):
        check_groups(groups, config.bound_objective, config.train.micro_batch_tokens)
    few, _ = load_groups(config_for(tmp_path, path, edges="best_worst").data, "train", tokenizer)
    check_groups(few, config.bound_objective, config.train.micro_batch_tokens)


def show(tokenizer, row: dict[str, Any], **data: Any) -> tuple[str, list[str]]:
    """The prompt and the completions of a row, read as `messages`, as text."""
    from madpo.trainer.formats.adapters import ADAPTERS
    from madpo.trainer.formats.read_row import read_row

    group = read_row(row, ADAPTERS["messages"], RowRules())
    tokens = tokenise(group, tokenizer, TokenRules(600, template_kwargs=data))
    assert not tokens.problem
    return tokenizer.decode(tokens.prompt), [tokenizer.decode(x) for x in tokens.completions]


CALL = {"type": "function", "function": {"name": "look", "arguments": {"day": "now"}}}


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "json-text"])
def test_tools_and_calls_reach_the_template(tokenizer, tools):
    messages = [
        user("on?"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "a film", "tool_calls": None},
        *answer("A film."),
    ]
    prompt, completions = show(tokenizer, {"messages": messages, "tools": tools})
    assert prompt.startswith(f"<tools>{json.dumps(TOOLS)}</tools><user>on?</user>")
    assert prompt.endswith('<assistant>[look{"day": "now"}]</assistant><tool>a film</tool><assistant>')
    assert completions == ["A film.</assistant>"]


def test_a_completion_may_be_a_call(tokenizer):
    given = {"name": "look", "arguments": {"day": "now", "city": None}, "strict": None}
    calling = {"role": "assistant", "tool_calls": [{**CALL, "function": given}], "content": None}
    prompt, (said,) = show(tokenizer, {"messages": [user("on?"), calling], "tools": None})
    assert (prompt, said) == ("<user>on?</user><assistant>", '[look{"day": "now", "city": null}]</assistant>')


def test_a_prompt_that_ends_with_a_call_is_followed_by_its_result(tokenizer):
    calling = {"role": "assistant", "tool_calls": [CALL]}
    group = TextGroup([user("on?"), calling], [[{"role": "tool", "content": "x"}, *answer("A.")]], [])
    tokens = tokenise(group, tokenizer, TokenRules(600))
    assert tokenizer.decode(tokens.completions[0]) == "<tool>x</tool><assistant>A.</assistant>"


def test_a_prompt_that_ends_with_words_is_continued_by_all_completions_or_by_none(tokenizer):
    result: list[Any] = [{"role": "tool", "content": "x"}, *answer("A.")]
    group = TextGroup([user("on?"), *answer("It is")], [result, answer(" on.")], [])
    with pytest.raises(ValueError, match="the prompt ends with words of the assistant"):
        tokenise(group, tokenizer, TokenRules(600))


def test_template_variables_of_all_rows_and_of_one(tokenizer):
    messages = [user("on?"), *answer("A.")]
    assert show(tokenizer, {"messages": messages})[0] == "<user>on?</user><assistant>"
    assert show(tokenizer, {"messages": messages}, short=True)[0] == "<short><user>on?</user><assistant>"
    row = {"messages": messages, "chat_template_kwargs": {"short": False}}
    assert show(tokenizer, row, short=True)[0] == "<user>on?</user><assistant>"


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"tools": "look"}, "tools: expected JSON"),
        ({"tools": {"name": "x"}}, "tools: expected a list of JSON schemas"),
        ({"chat_template_kwargs": "short"}, "chat_template_kwargs: expected an object"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs: tools: madpo sets"),
    ],
)
def test_bad_tools_and_variables_name_their_column(tokenizer, columns, message):
    with pytest.raises(ValueError, match=message):
        show(tokenizer, {"messages": [user("on?"), *answer("A.")], **columns})


def test_neither_text_nor_calls_is_no_message(tokenizer):
    for message in ({"role": "assistant"}, {"role": "assistant", "tool_calls": []}, {"role": "tool"}):
        with pytest.raises(ValueError, match="a message needs text under role and content"):
            show(tokenizer, {"messages": [user("on?"), message]})


def test_two_bos_tokens_in_front_of_a_conversation_are_refused_with_the_place(tmp_path, tokenizer):
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    rows = [{"messages": [user("on?"), *answer("A.")]}]
    groups, _ = load_groups(
        config_for(tmp_path, write(tmp_path / "rows.jsonl", rows)).data, "train", tokenizer, supervised=True
    )
    assert groups[0].prompt[:2].count(tokenizer.bos_token_id) == 1
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the conversation begins with <bos> twice"):
        load_groups(config_for(tmp_path, tmp_path / "rows.jsonl").data, "train", tokenizer, supervised=True)


def test_rows_that_spell_special_tokens_are_counted(tmp_path, tokenizer):
    pairs = [("a", " b"), ("a", " b<eos> c"), ("<bos>", " b"), ("a", " <eo s>")]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    path = write(tmp_path / "rows.jsonl", rows)
    _, read = load_groups(config_for(tmp_path, path).data, "train", tokenizer, supervised=True)
    report = read()
    assert report["texts_that_spell_special_tokens"] == 2
    assert report["rows_that_spell_special_tokens"] == 0
    chats = [{"messages": [user(p), *answer(c)]} for p, c in pairs]
    path = write(tmp_path / "chats.jsonl", chats)
    _, read = load_groups(config_for(tmp_path, path).data, "train", tokenizer, supervised=True)
    report = read()
    assert report["rows_that_spell_special_tokens"] == 2
    assert report["texts_that_spell_special_tokens"] == 0


@pytest.mark.ranks
def test_a_step_on_groups_of_four_is_the_mean_over_their_edges(tmp_path, tokenizer_folder):
    """Against plain PyTorch, by hand from the scores: log-sigmoid of every better minus every worse one."""
    random = np.random.default_rng(0)
    scores = [[3.0, 1.0, 2.0, 2.0], [0.5, 2.5, 1.5, 4.0], [1.0, 1.0, 1.0, 2.0]]
    rows = [
        {
            "prompt": f"{i} {sentence(random)}:",
            "completions": [f" {sentence(random, 2, 12)}" for _ in range(4)],
            "scores": numbers,
        }
        for i, numbers in enumerate(scores)
    ]
    names = {
        role: str(save_model(tmp_path / role, tokenizer_folder, seed=seed))
        for role, seed in (("model_name_or_path", 1), ("ref_model_name_or_path", 2))
    }
    config = make_config(
        tmp_path,
        {
            "model": names,
            "data": {"dataset_name": str(write(tmp_path / "rows.jsonl", rows))},
            "objective": {"loss_type": "dpo", "beta": 0.1},
            "train": {"global_batch_size": 3},
        },
    )
    want_loss, want = by_hand(config, scores)
    ((loss, gradients),) = run_ranks(2, zero3_steps, config, 1)[0]
    assert loss == pytest.approx(want_loss, rel=1e-5)
    for name, gradient in want.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def by_hand(config: Config, scores: list[list[float]]) -> tuple[float, dict[str, torch.Tensor]]:
    from transformers import AutoModelForCausalLM

    groups = load_data(config, load_tokenizer(config.model), training=True).train
    assert groups is not None
    batch = [groups[index] for index in range(3)]
    assert config.model.model_name_or_path and config.model.ref_model_name_or_path
    policy: Any = AutoModelForCausalLM.from_pretrained(config.model.model_name_or_path)
    reference: Any = AutoModelForCausalLM.from_pretrained(config.model.ref_model_name_or_path)
    with torch.no_grad():
        ref_logps = padded_logps(reference, batch)
    rewards = (0.1 * (padded_logps(policy, batch) - ref_logps)).view(3, 4)
    losses = [
        -F.logsigmoid(rewards[g, i] - rewards[g, j])
        for g in range(3)
        for i, j in permutations(range(4), 2)
        if scores[g][i] > scores[g][j]
    ]
    assert len(losses) == 5 + 6 + 3
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in policy.named_parameters()}


def test_a_margin_beside_ranked_completions_is_that_of_best_and_worst():
    """Annotate writes this form under edges best_worst; for several comparisons it would say nothing."""
    row = {"prompt": "p", "completions": ["a", "b", "c"], "scores": [3.0, 1.0, 2.0], "margin": 7.0}
    assert read_row(row, ADAPTERS["scored"], RowRules(edges="best_worst")).edges == [(0, 1, 7.0)]
    with pytest.raises(ValueError, match="margin: one number, and the row makes 3 comparisons"):
        read_row(row, ADAPTERS["scored"], RowRules())
    assert read_row(row, ADAPTERS["scored"], RowRules(), supervised=True).completions == ["a"]
