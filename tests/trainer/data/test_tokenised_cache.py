"""From rows on disk to token groups: layouts, boundaries, bad input with its place, the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness import make_config, run_ranks, write_pairs
from transformers import AutoTokenizer

from madpo.trainer.config.schema import Config
from madpo.trainer.data import tokenised_cache
from madpo.trainer.data.groups import check_groups
from madpo.trainer.data.tokenise import TokenRules, tokenise
from madpo.trainer.data.tokenised_cache import load_groups, tokenise_all
from madpo.trainer.formats.text_groups import TextGroup, layout_of, parse_json_line, to_group

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def preference(**fields: Any) -> TextGroup:
    return to_group(fields, "preference")


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


def test_the_prompt_may_be_implicit_in_conversations():
    shared = [user("film?"), assistant("which?"), user("this")]
    group = preference(chosen=[*shared, assistant("good")], rejected=[*shared, assistant("bad")])
    assert group.prompt == shared
    assert group.completions == [[assistant("good")], [assistant("bad")]]


def test_a_prompt_repeated_in_chosen_and_rejected_is_taken_off():
    """UltraFeedback's layout, with a text prompt column turned into messages by the user."""
    prompt = [user("film?")]
    group = preference(prompt=prompt, chosen=[*prompt, assistant("good")], rejected=[*prompt, assistant("x")])
    assert group.completions[0] == [assistant("good")]


def test_null_keys_of_parquet_messages_and_a_system_message_change_nothing():
    prompt = [user("film?")]
    chosen = [{"role": "system", "content": "be kind"}, {**user("film?"), "name": None}, assistant("good")]
    rejected = [*chosen[:2], assistant("bad")]
    group = preference(prompt=prompt, chosen=chosen, rejected=rejected)
    assert group.prompt == [{"role": "system", "content": "be kind"}, user("film?")]
    assert group.completions == [[assistant("good")], [assistant("bad")]]


def test_words_of_the_user_are_never_trained_on():
    with pytest.raises(ValueError, match="a completion has the roles assistant, user, assistant"):
        preference(
            prompt=[user("a")], chosen=[assistant("b"), user("c"), assistant("d")], rejected=[assistant("e")]
        )
    with pytest.raises(ValueError, match="at least two messages"):
        to_group({"messages": [assistant("a")]}, "messages")


def test_a_prompt_that_ends_in_the_assistants_words_is_continued(tokenizer):
    tokenizer.chat_template = CHAT
    prompt = [user("film?"), assistant("It is")]
    group = preference(prompt=prompt, chosen=[assistant(" good")], rejected=[assistant(" bad")])
    tokens = tokenise(group, tokenizer, TokenRules(64))
    assert tokenizer.decode(tokens.prompt) == "<user>film?</user><assistant>It is"
    assert tokenizer.decode(tokens.completions[0]) == " good</assistant>"


def test_supervised_training_on_pairs_uses_the_chosen_completion():
    row = {"prompt": "a:", "chosen": " good", "rejected": " bad", "margin": 1.0}
    assert to_group(row, layout_of(row, supervised=True), supervised=True) == TextGroup("a:", [" good"], [])
    assert layout_of({"chosen", "rejected", "messages"}, supervised=True) == "messages"
    assert layout_of({"chosen", "rejected", "messages"}) == "preference"


def test_ultrafeedback_repeats_the_prompt_as_text_and_has_scores():
    shared = [user("film?")]
    row = {
        "prompt": "film?",
        "chosen": [*shared, assistant("good")],
        "rejected": [*shared, assistant("bad")],
        "score_chosen": 8.5,
        "score_rejected": 6,
    }
    group = to_group(row, "preference")
    assert group.prompt == shared
    assert group.edges == [(0, 1, 2.5)]
    assert to_group(row | {"margin": 0.0}, "preference").edges == [(0, 1, 0.0)]
    with pytest.raises(ValueError, match="score_chosen: expected a finite number"):
        to_group(row | {"score_chosen": float("nan")}, "preference")


def test_supervised_layouts():
    assert layout_of(["prompt", "completion", "id"]) == "prompt-completion"
    assert to_group({"prompt": "a", "completion": "b"}, "prompt-completion").completions == ["b"]
    messages = [user("q"), assistant("a")]
    assert to_group({"messages": messages}, "messages") == TextGroup(messages[:1], [messages[1:]], [])
    assert to_group({"text": "a b"}, "text") == TextGroup("", ["a b"], [])
    with pytest.raises(ValueError, match=r"\['answer', 'question'\] are no known layout"):
        layout_of(["question", "answer"])


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


BAD_FIELDS = [
    ({"prompt": "a", "chosen": "", "rejected": "b"}, "chosen is empty"),
    (
        {"prompt": "a", "chosen": 7, "rejected": "b"},
        "chosen: expected text or a list of messages, got 7",
    ),
    ({"prompt": "a", "chosen": "b", "rejected": None}, "rejected: expected text"),
    ({"chosen": "b", "rejected": "c"}, "prompt is missing"),
    ({"prompt": "a", "chosen": [], "rejected": "c"}, "chosen: expected text or a list"),
    (
        {"prompt": "a", "chosen": [{"role": "user"}], "rejected": "c"},
        "a message needs text under role",
    ),
    ({"prompt": "a", "chosen": "b", "rejected": [user("c")]}, "all be text or all be lists"),
    (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "1"},
        "margin: expected a finite number",
    ),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": True}, "margin: expected a finite"),
    (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("inf")},
        "margin: expected a finite",
    ),
]


@pytest.mark.parametrize("row, message", BAD_FIELDS, ids=[message[:30] for _, message in BAD_FIELDS])
def test_bad_rows_name_the_field(row, message):
    with pytest.raises(ValueError, match=message):
        to_group(row, "preference")


BAD_LINES = [
    (b'{"a": NaN}', "NaN is not a number"),
    (b'{"a": -Infinity}', "-Infinity is not a number"),
    (b'{"a": 1, "a": 2}', "key 'a' stands twice"),
    (b'{"a": 1', "not JSON"),
    (b"[1]", "expected a JSON object, got list"),
    (b'{"a": "\xff"}', "not UTF-8"),
    ('{"a": 1}'.encode("utf-16"), "iconv"),
]


@pytest.mark.parametrize("raw, message", BAD_LINES, ids=[message for _, message in BAD_LINES])
def test_bad_lines_are_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        parse_json_line(raw)


def test_a_byte_order_mark_and_crlf_are_fine():
    assert parse_json_line(b'\xef\xbb\xbf{"a": 1}\r\n') == {"a": 1}


def config_for(folder: Path, path: Path, **data: Any) -> Config:
    return make_config(
        folder,
        {"model": {"model_name_or_path": "unused"}, "data": {"dataset_name": str(path), **data}},
    )


def test_the_first_bad_line_stops_the_run_with_its_place(tmp_path, tokenizer):
    path = write_pairs(tmp_path / "pairs.jsonl", 5)
    lines = path.read_text().splitlines()
    lines[2] = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c", "margin": None} | {"chosen": 3})
    path.write_text("\n\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"pairs\.jsonl:5: chosen: expected text .* got 3"):
        load_groups(config_for(tmp_path, path).data, "train", tokenizer)
    groups, report = load_groups(config_for(tmp_path, path, on_bad_row="drop").data, "train", tokenizer)
    assert len(groups) == 4 and report["dropped"] == {"unreadable": 1}


def test_a_non_finite_margin_is_refused_at_load_time(tmp_path, tokenizer):
    path = write_pairs(tmp_path / "pairs.jsonl", 3)
    path.write_text(path.read_text() + '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": NaN}\n')
    with pytest.raises(ValueError, match=r"pairs\.jsonl:4: NaN is not a number"):
        load_groups(config_for(tmp_path, path).data, "train", tokenizer)


def test_a_missing_margin_is_refused_when_the_objective_needs_it(tmp_path, tokenizer):
    path = write_pairs(tmp_path / "pairs.jsonl", 3)
    path.write_text(path.read_text() + '{"prompt": "a", "chosen": " b", "rejected": " c"}\n')
    config = make_config(
        tmp_path,
        {
            "model": {"model_name_or_path": "unused"},
            "data": {"dataset_name": str(path)},
            "objective": {"loss_type": "madpo"},
        },
    )
    groups, _ = load_groups(config.data, "train", tokenizer)
    with pytest.raises(ValueError, match="1 of 4 rows have no margin"):
        check_groups(groups, config.bound_objective, 4096)


def test_supervised_rows_are_refused_by_pairwise_objectives(tmp_path, tokenizer):
    path = tmp_path / "text.jsonl"
    path.write_text('{"prompt": "a", "completion": " b"}\n')
    config = config_for(tmp_path, path)
    groups, _ = load_groups(config.data, "train", tokenizer)
    with pytest.raises(ValueError, match="compares completions"):
        check_groups(groups, config.bound_objective, 4096)


def test_the_report_counts_what_was_cut_and_dropped(tmp_path, tokenizer):
    rows = [
        {"prompt": "a go", "chosen": "od", "rejected": " bad", "margin": 1.0},
        {"prompt": "a:", "chosen": " same", "rejected": " same", "margin": 0.0},
        {"prompt": "film " * 40, "chosen": " a", "rejected": " b", "margin": 2.0},
        {"prompt": "a:", "chosen": " good" * 40, "rejected": " b", "margin": -2.0},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    groups, report = load_groups(config_for(tmp_path, path, max_length=24).data, "train", tokenizer)
    assert len(groups) == report["groups"] == 2
    assert report["dropped"] == {
        "chosen and rejected are the same tokens": 1,
        "prompt fills max_length": 1,
    }
    assert report["truncated_completions"] == 1
    assert report["groups_with_moved_boundary"] == 1
    assert report["tokens"] == groups.counts.lengths.sum()


def test_nothing_left_to_train_on_is_an_error_with_numbers(tmp_path, tokenizer):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a:", "chosen": " b", "rejected": " b"}\n')
    with pytest.raises(ValueError, match="none of 1 rows can be trained on"):
        load_groups(config_for(tmp_path, path).data, "train", tokenizer)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no rows"):
        load_groups(config_for(tmp_path, tmp_path / "empty.jsonl").data, "train", tokenizer)


def test_missing_files_and_splits_say_what_is_there(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="no such file"):
        load_groups(config_for(tmp_path, tmp_path / "no.jsonl").data, "train", tokenizer)
    write_pairs(tmp_path / "set" / "train.jsonl", 2)
    with pytest.raises(ValueError, match=r"no split 'test'.*found \['train\.jsonl'\]"):
        load_groups(config_for(tmp_path, tmp_path / "set").data, "test", tokenizer)


def test_training_rows_are_never_held_out(tmp_path, tokenizer):
    path = write_pairs(tmp_path / "pairs.jsonl", 3)
    with pytest.raises(ValueError, match="is a single file, so 'test' would be its training rows"):
        load_groups(config_for(tmp_path, path).data, "test", tokenizer)
    with pytest.raises(ValueError, match="it is the training split"):
        config_for(tmp_path, path, dataset_test_split="train")


def test_a_split_that_stands_there_twice_is_refused(tmp_path, tokenizer):
    write_pairs(tmp_path / "set" / "train.jsonl", 2)
    (tmp_path / "set" / "train.parquet").touch()
    with pytest.raises(ValueError, match="stands there twice"):
        load_groups(config_for(tmp_path, tmp_path / "set").data, "train", tokenizer)


ODD_ROWS = [
    '{"prompt": "a", "chosen": "\\ud800", "rejected": "c"}',
    '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1' + "0" * 400 + "}",
    '{"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1e308, "score_rejected": -1e308}',
    '{"prompt": ' + "[" * 100_000,
    '{"prompt": [{"role": "tool", "content": "x"}], "chosen": [{"role": "assistant", "content": "x"}], '
    '"rejected": [{"role": "assistant", "content": "y"}]}',
]


@pytest.mark.parametrize(
    "line", ODD_ROWS, ids=["surrogate", "huge", "infinite-difference", "deep", "template"]
)
def test_odd_rows_end_with_file_and_line_and_can_be_dropped(tmp_path, tokenizer, line):
    tokenizer.chat_template = CHAT + "{% if messages[0]['role'] == 'tool' %}{{ 1 / 0 }}{% endif %}"
    path = write_pairs(tmp_path / "pairs.jsonl", 3)
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1: "):
        load_groups(config_for(tmp_path, path).data, "train", tokenizer)
    groups, _ = load_groups(config_for(tmp_path, path, on_bad_row="drop").data, "train", tokenizer)
    assert len(groups) == 3


def test_a_name_that_is_nowhere_says_what_was_tried(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"'no/such-set' is no local file or folder, and loading it by name"):
        load_groups(config_for(tmp_path, Path("no/such-set")).data, "train", tokenizer)


def test_parquet_and_folders_give_the_same_groups_as_jsonl(tmp_path, tokenizer):
    import datasets

    path = write_pairs(tmp_path / "set" / "train.jsonl", 6)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "pairs.parquet"))
    from_folder, _ = load_groups(config_for(tmp_path, tmp_path / "set").data, "train", tokenizer)
    from_parquet, _ = load_groups(config_for(tmp_path, tmp_path / "pairs.parquet").data, "train", tokenizer)
    assert [from_folder[i] for i in range(6)] == [from_parquet[i] for i in range(6)]


def test_tokenised_once_and_again_only_when_something_that_matters_changes(tmp_path, tokenizer, monkeypatch):
    calls = []
    original = tokenise_all
    monkeypatch.setattr(tokenised_cache, "tokenise_all", lambda *a: (calls.append(1), original(*a)))
    path = write_pairs(tmp_path / "pairs.jsonl", 4)
    load_groups(config_for(tmp_path, path).data, "train", tokenizer)
    load_groups(config_for(tmp_path, path).data, "train", tokenizer)
    assert len(calls) == 1
    (tmp_path / "copy.jsonl").write_bytes(path.read_bytes())
    load_groups(config_for(tmp_path, tmp_path / "copy.jsonl").data, "train", tokenizer)
    assert len(calls) == 1, "the same content under another name"
    load_groups(config_for(tmp_path, path, max_length=32).data, "train", tokenizer)
    load_groups(config_for(tmp_path, path, append_eos="never").data, "train", tokenizer)
    tokenizer.chat_template = CHAT
    load_groups(config_for(tmp_path, path).data, "train", tokenizer)
    path.write_text(path.read_text().replace("good", "fine"))
    load_groups(config_for(tmp_path, path).data, "train", tokenizer)
    assert len(calls) == 5


def load_a_copy(shard, folder: Path, name: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(name)
    path = folder / f"pairs-{shard.rank}.jsonl"
    return load_groups(config_for(folder, path).data, "train", tokenizer)[0].fingerprint


@pytest.mark.ranks
def test_two_names_of_equal_content_at_once(tmp_path, tokenizer_folder):
    """One process tokenises, the other waits for it, though their files have different locks."""
    rows = write_pairs(tmp_path / "pairs-0.jsonl", 400).read_bytes()
    (tmp_path / "pairs-1.jsonl").write_bytes(rows)
    one, two = run_ranks(2, load_a_copy, tmp_path, str(tokenizer_folder))
    assert one == two
    assert len([path for path in (tmp_path / "cache").glob("groups-*") if path.is_dir()]) == 1


def test_several_processes_tokenise_the_same(tmp_path, tokenizer):
    path = write_pairs(tmp_path / "pairs.jsonl", 20)
    alone, _ = load_groups(config_for(tmp_path / "1", path).data, "train", tokenizer)
    other = config_for(tmp_path / "2", path, cache_dir=str(tmp_path / "cache2"), dataset_num_proc=2)
    together, _ = load_groups(other.data, "train", tokenizer)
    assert [alone[i] for i in range(20)] == [together[i] for i in range(20)]
