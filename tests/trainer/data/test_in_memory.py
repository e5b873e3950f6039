"""Data sets in memory: written by content, and refused with the row's place in memory."""

from __future__ import annotations

from decimal import Decimal

import datasets
import numpy as np
import pytest
from text_cases import config_for

from madpo.trainer.data.in_memory import named_as_given, write_splits
from madpo.trainer.data.tokenised_cache import load_groups
from madpo.trainer.errors import UserError

ROWS = [{"prompt": "ü", "chosen": "a", "rejected": "b", "margin": np.float32(0.5)}, {"text": ["x", None]}]


def test_equal_content_has_one_file_and_other_content_another(tmp_path):
    first, again = (write_splits({"train": ROWS}, tmp_path)["train"] for _ in range(2))
    assert first == again and first.read_text("utf-8").splitlines()[1] == '{"text": ["x", null]}'
    assert '"margin": 0.5' in first.read_text("utf-8") and "ü" in first.read_text("utf-8")
    assert write_splits({"train": ROWS[:1]}, tmp_path)["train"] != first
    assert [path.name for path in first.parent.iterdir()] == ["train.jsonl"]
    assert len(list(first.parents[1].iterdir())) == 2  # no drafts


def test_decimals_are_numbers(tmp_path):
    file = write_splits({"train": [{"margin": Decimal("1.25"), "nested": [Decimal(2)]}]}, tmp_path)["train"]
    assert file.read_text("utf-8") == '{"margin": 1.25, "nested": [2.0]}\n'


def test_a_dataset_becomes_parquet_with_the_rows_that_are_selected(tmp_path):
    dataset = datasets.Dataset.from_list([{"text": str(i)} for i in range(5)]).select([3, 1])
    files = write_splits({"train": dataset, "evaluation": [{"text": "9"}]}, tmp_path)
    assert {file.parent for file in files.values()} == {files["train"].parent}
    back = datasets.Dataset.from_parquet(str(files["train"]), cache_dir=str(tmp_path / "cache"))
    assert isinstance(back, datasets.Dataset) and back.to_dict() == {"text": ["3", "1"]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "train: there are no rows"),
        ("data.jsonl", r"got str; the path of a data set belongs into the config, as data\.dataset_name"),
        ({"prompt": ["a"]}, "got dict; as in"),
        (datasets.DatasetDict({"a": datasets.Dataset.from_list(ROWS[1:])}), "give one of its splits: a"),
        ([ROWS[0], "text"], r"train\[1\]: expected a dict, got str: 'text'"),
        ([{"prompt": {1, 2}}], r"train\[0\]: set is not JSON serializable"),
    ],
    ids=str,
)
def test_what_is_no_data_set_is_refused(rows, message, tmp_path):
    with pytest.raises(UserError, match=message):
        write_splits({"train": rows}, tmp_path)
    assert not list((tmp_path / "in_memory").iterdir())


@pytest.mark.parametrize("given", [list, datasets.Dataset.from_list])
def test_errors_and_reports_name_the_row_in_memory(tmp_path, tokenizer, given):
    pair = {"prompt": "a:", "chosen": " b", "rejected": " c"}
    files = write_splits({"train": given([pair, {**pair, "chosen": ""}, pair])}, tmp_path)
    data = config_for(tmp_path, files["train"].parent).data
    with pytest.raises(UserError, match=r"^train\[1\]: chosen is empty; mend"):
        load_groups(data, "train", tokenizer)
    _, read = load_groups(data.model_copy(update={"on_bad_row": "drop"}), "train", tokenizer)
    report = read()
    assert report["where"] == {
        "unreadable": ["train[1]: chosen is empty"],
        "repeated_examples": ["train[2] (as train[0])"],
    }


def test_errors_name_the_argument_and_not_its_file(tmp_path):
    files = write_splits({"train": ROWS}, tmp_path)
    with pytest.raises(UserError, match=r"^train: none$"), named_as_given(files):
        raise UserError(f"{files['train']}: none")


def test_rows_that_are_parted_elsewhere_are_other_splits(tmp_path):
    """The bytes of both files together are the same."""
    rows = [{"prompt": "a", "chosen": "b", "rejected": f"c{i}"} for i in range(4)]
    one = write_splits({"train": rows[:3], "evaluation": rows[3:]}, tmp_path)
    other = write_splits({"train": rows[:1], "evaluation": rows[1:]}, tmp_path)
    alone = write_splits({"evaluation": rows[:3]}, tmp_path)
    lines = [[len(file.read_text().splitlines()) for file in files.values()] for files in (one, other, alone)]
    assert lines == [[3, 1], [1, 3], [3]]
    assert write_splits({"train": rows[:3], "evaluation": rows[3:]}, tmp_path) == one
