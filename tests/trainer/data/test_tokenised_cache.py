"""From rows on disk to token groups: layouts, boundaries, bad input with its place, the cache."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from harness import make_config, run_ranks, write_pairs
from text_cases import CHAT, config_for
from transformers import AutoTokenizer

from madpo.trainer import files
from madpo.trainer.data import known_splits, tokenised_cache
from madpo.trainer.data.groups import check_groups
from madpo.trainer.data.tokenised_cache import load_groups, tokenise_all


def test_the_first_bad_line_stops_the_run_with_its_place(tmp_path, tokenizer):
    path = write_pairs(tmp_path / "pairs.jsonl", 5)
    lines = path.read_text().splitlines()
    lines[2] = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c", "margin": None} | {"chosen": 3})
    path.write_text("\n\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"pairs\.jsonl:5: chosen: expected text .* got 3"):
        load_groups(config_for(tmp_path, path).data, "train", tokenizer)
    groups, read = load_groups(config_for(tmp_path, path, on_bad_row="drop").data, "train", tokenizer)
    report = read()
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


def test_nothing_left_to_train_on_is_an_error_with_numbers(tmp_path, tokenizer):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a:", "chosen": " b", "rejected": " b"}\n')
    with pytest.raises(ValueError, match=r"its only row cannot be trained on \(1: chosen and rejected are"):
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
    '{"prompt": "a", "chosen": "b", "rejected": "c", "x": ' + "[" * 990 + "]" * 990 + "}",
    '{"prompt": [{"role": "tool", "content": "x"}], "chosen": [{"role": "assistant", "content": "x"}], '
    '"rejected": [{"role": "assistant", "content": "y"}]}',
]


@pytest.mark.parametrize(
    "line", ODD_ROWS, ids=["surrogate", "huge", "infinite-difference", "deep", "too-deep", "template"]
)
def test_odd_rows_end_with_file_and_line_and_can_be_dropped(tmp_path, tokenizer, line):
    tokenizer.chat_template = CHAT + "{% if messages[0]['role'] == 'tool' %}{{ 1 / 0 }}{% endif %}"
    path = write_pairs(tmp_path / "pairs.jsonl", 3)
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1: ") as refused:
        load_groups(config_for(tmp_path, path).data, "train", tokenizer)
    assert ("nested too deeply" in str(refused.value)) == ("[[[" in line)
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


def refused(*_: Any) -> Any:
    raise AssertionError("it was read")


def test_a_start_that_finds_its_files_untouched_reads_none_of_them(tmp_path, tokenizer, monkeypatch):
    data = config_for(tmp_path, write_pairs(tmp_path / "pairs.jsonl", 5)).data
    monkeypatch.setattr(known_splits, "SECONDS_UNTIL_SETTLED", 0.0)
    first = load_groups(data, "train", tokenizer)[0]
    with monkeypatch.context() as patched:
        patched.setattr(tokenised_cache, "open_source", refused)
        patched.setattr(tokenised_cache, "FileLock", refused)
        patched.setattr(files, "hash_of_file", refused)
        again, report = load_groups(data, "train", tokenizer)
        assert again.fingerprint == first.fingerprint and [*again] == [*first]
        assert report()["where"] == {} and report()["rows"] == 5
        with pytest.raises(AssertionError, match="it was read"):
            load_groups(data.model_copy(update={"max_length": 9}), "train", tokenizer)


@pytest.mark.parametrize("settled", [True, False])
def test_files_that_were_written_to_are_read_again(tmp_path, tokenizer, monkeypatch, settled):
    """Also by a tool that sets the time of change back; and soon after they were read."""
    path = write_pairs(tmp_path / "pairs.jsonl", 5)
    data = config_for(tmp_path, path).data
    monkeypatch.setattr(known_splits, "SECONDS_UNTIL_SETTLED", 0.0 if settled else 1e9)
    first, facts = load_groups(data, "train", tokenizer)[0], path.stat()
    assert len([*Path(data.cache_dir).glob("split-*.json")]) == settled
    time.sleep(0.02)  # a file system's clock ticks every few milliseconds
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert path.stat().st_size == facts.st_size
    assert [*load_groups(data, "train", tokenizer)[0]] != [*first]


def test_several_processes_tokenise_the_same(tmp_path, tokenizer):
    path = write_pairs(tmp_path / "pairs.jsonl", 20)
    alone, _ = load_groups(config_for(tmp_path / "1", path).data, "train", tokenizer)
    other = config_for(tmp_path / "2", path, cache_dir=str(tmp_path / "cache2"), dataset_num_proc=2)
    together, _ = load_groups(other.data, "train", tokenizer)
    assert [alone[i] for i in range(20)] == [together[i] for i in range(20)]


@pytest.mark.parametrize("damage", ["a flipped bit", "truncated", "a file less", "no checksums"])
def test_damaged_cached_tokens_are_made_anew_and_that_is_said(tmp_path, tokenizer, capfd, damage):
    data = config_for(tmp_path, write_pairs(tmp_path / "pairs.jsonl", 5)).data
    whole = load_groups(data, "train", tokenizer)[0]
    want = [whole[index] for index in range(5)]
    (cache,) = Path(data.cache_dir).glob("groups-*[0-9a-f]")
    table = cache / "data-00000-of-00001.arrow"
    content = bytearray(table.read_bytes())
    if damage == "a flipped bit":
        content[len(content) // 2] ^= 4
        table.write_bytes(content)
    elif damage == "truncated":
        table.write_bytes(content[: len(content) // 2])
    else:
        (table if damage == "a file less" else cache / "seal.json").unlink()
    again = load_groups(data, "train", tokenizer)[0]
    assert [again[index] for index in range(5)] == want
    said = capfd.readouterr().err
    assert said.count("damaged cache") == 1 and f"{cache}: " in said and "tokenising anew" in said
    load_groups(data, "train", tokenizer)
    assert "damaged" not in capfd.readouterr().err
