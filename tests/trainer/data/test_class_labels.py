"""Columns of class numbers are read by the names of their classes."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
from harness import make_config

from madpo.trainer.data.class_labels import classes_in, with_class_names
from madpo.trainer.data.training_data import load_data
from madpo.trainer.errors import UserError


def labelled(names: list[str], **more: Any) -> datasets.Dataset:
    rows = {"prompt": ["a:", "b:"], "completion": [" c", " d"], "label": [0, 1], **more}
    return datasets.Dataset.from_dict(rows).cast_column("label", datasets.ClassLabel(names=names))


def labels(folder, tokenizer, streaming: bool = False, **data: Any) -> list[int]:
    tree = {
        "model": {"model_name_or_path": "unused"},
        "data": {"dataset_name": str(folder), "streaming": streaming, **data},
        "objective": {"loss_type": "kto"},
        "train": {"max_steps": 1},
    }
    source = load_data(make_config(folder, tree), tokenizer, training=True).source
    assert source is not None
    groups, indices = source.take(0, 2)
    return sorted(int(groups[int(i)].labels[0]) * (1 + len(groups[int(i)].prompt)) for i in indices)


@pytest.mark.parametrize(
    ("names", "signs"),
    [
        (["desirable", "undesirable"], [1, -1]),
        (["Undesirable", "Desirable"], [-1, 1]),
        (["1", "0"], [1, -1]),
        (["False", "True"], [-1, 1]),
    ],
)
@pytest.mark.parametrize("form", ["parquet", "saved", "stream"])
def test_a_label_says_what_its_class_is_called(tmp_path, tokenizer, form, names, signs):
    rows = labelled(names, prompt=["a:", "b: longer"])
    if form == "saved":
        rows.save_to_disk(tmp_path)
    else:
        rows.to_parquet(tmp_path / "train.parquet")
    short, long = 1 + len(tokenizer("a:").input_ids), 1 + len(tokenizer("b: longer").input_ids)
    found = labels(tmp_path, tokenizer, streaming=form == "stream")
    assert found == sorted([signs[0] * short, signs[1] * long])


def test_a_renamed_label_too(tmp_path, tokenizer):
    labelled(["good", "bad"]).rename_column("label", "quality").to_parquet(tmp_path / "train.parquet")
    one, other = labels(tmp_path, tokenizer, columns={"label": "quality"})
    assert one == -other


def test_classes_whose_names_do_not_say_it_are_refused(tmp_path, tokenizer):
    labelled(["sports", "world"]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"row 0: label: .* got the class 'sports'; name the two classes"):
        labels(tmp_path, tokenizer)


def test_files_that_number_their_classes_otherwise_are_refused(tmp_path, tokenizer):
    for number, names in enumerate((["good", "bad"], ["bad", "good"])):
        labelled(names).to_parquet(tmp_path / f"train-{number}.parquet")
    with pytest.raises(UserError, match=r"train-0\.parquet: column label is .*'good'.* in another"):
        labels(tmp_path, tokenizer)


def test_names_are_found_at_any_depth_and_no_class_is_none():
    topic = datasets.ClassLabel(names=["news", "2.5", "NaN"])
    features = datasets.Features({"t": topic, "x": datasets.Value("int8"), "l": datasets.List({"t": topic})})
    assert classes_in(features).keys() == {"t", "l"} and classes_in(None) == {}
    assert [with_class_names(x, topic) for x in (0, 1, 2, -1, None)] == ["news", 2.5, "NaN", None, None]
    assert with_class_names([{"t": 0}, {"t": None}], features["l"]) == [{"t": "news"}, {"t": None}]
