"""The sentiment experiment's own parts: text, oracle, pairs, estimates."""

from __future__ import annotations

import json
import math
import zipfile
from collections import Counter

import numpy as np
import pytest

from madpo.benchmarks.sentiment import results, text, tiers
from madpo.benchmarks.sentiment.oracle import judge, reward
from madpo.benchmarks.sentiment.results import Sample, Setting, at_equal_kl, difference, estimate
from madpo.benchmarks.sentiment.tiers import Candidate
from madpo.trainer.errors import UserError

SENTENCES = 400


def write_reviews(path, archive=False):
    """Documents of four sentences each, half of them negative, in words that differ from line to line."""
    random = np.random.default_rng(0)
    words = [f"{a}{b}" for a in "bcdfghjkl" for b in ("an", "ell", "ist", "orn", "umb")]
    files = {}
    for number in range(SENTENCES // 4):
        kind = ("neg", "pos")[number % 2]
        tone = ("awful", "great")[number % 2]
        lines = [" ".join([*random.choice(words, 13), tone, "."]) for _ in range(4)]
        files[f"{kind}/{number:03}.txt"] = "\n".join(lines)
    if archive:
        with zipfile.ZipFile(path, "w") as file:
            for name, content in files.items():
                file.writestr(f"reviews/{name}", content)
    else:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(content)


def test_a_folder_and_a_zip_file_give_the_same_sentences(tmp_path):
    write_reviews(tmp_path / "folder")
    write_reviews(tmp_path / "reviews.zip", archive=True)
    folder, archive = (list(text.read_folder(tmp_path / name)) for name in ("folder", "reviews.zip"))
    assert len(folder) == SENTENCES
    assert [(s.text, s.negative) for s in folder] == [(s.text, s.negative) for s in archive]
    assert sum(s.negative for s in folder) == SENTENCES // 2


def test_documents_are_dealt_out_whole_and_every_sentence_once(tmp_path):
    write_reviews(tmp_path / "folder")
    sentences = list(text.read_folder(tmp_path / "folder"))
    parts = text.deal(sentences, text.SHARES)
    assert Counter(s.text for part in parts.values() for s in part) == Counter(s.text for s in sentences)
    owners = {}
    for name, part in parts.items():
        for sentence in part:
            assert owners.setdefault(sentence.document, name) == name
    share = {name: len(part) / len(sentences) for name, part in parts.items()}
    assert all(abs(share[name] - wanted) < 0.15 for name, wanted in text.SHARES.items())


def test_what_is_no_review_only_teaches_english():
    other = text.Sentence("the budget passed the house last night", "other", True, is_review=False)
    parts = text.deal([other], {"lm": 0.0, "sft": 0.5, "pairs": 0.5})
    assert parts == {"lm": [other], "sft": [], "pairs": []}


def test_prepared_parts_hold_what_they_say(tmp_path):
    write_reviews(tmp_path / "folder")
    text.prepare(tmp_path / "out", str(tmp_path / "folder"), scale=0.008, vocab_size=300)

    def rows(name):
        return [json.loads(x) for x in (tmp_path / "out" / name).read_text().splitlines()]

    assert len(rows("pairs/train.jsonl")) == 24 and len(rows("evaluation/train.jsonl")) == 8
    prompts = [
        row["prompt"] for name in ("sft", "pairs", "evaluation") for row in rows(f"{name}/train.jsonl")
    ]
    assert len(set(prompts)) == len(prompts)
    for row in rows("pairs/train.jsonl") + rows("evaluation/train.jsonl"):
        assert len(row["prompt"].split()) == 7
        assert row["completion"].startswith(" ") and "awful" in row["completion"]
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").is_file()


def test_sources_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(UserError, match="expected a folder or a"):
        text.prepare(tmp_path / "out", str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="in it, with one document per file"):
        text.prepare(tmp_path / "out", str(tmp_path / "empty"))
    write_reviews(tmp_path / "folder")
    with pytest.raises(UserError, match="only 2 sentences"):
        text.prepare(tmp_path / "out", str(tmp_path / "folder"), scale=0.0007)


def test_the_oracle_tells_praise_from_blame_within_its_range():
    pytest.importorskip("vaderSentiment")
    good, bad = "this is a wonderful , great and brilliant film .", "an awful , terrible and boring mess ."
    assert 1.5 < reward(good) <= 3 and -3 <= reward(bad) < -1.5 and reward("the door is open .") == 0
    assert judge(["it is "], [["great", "awful"]]) == [[reward("it is great"), reward("it is awful")]]


SAMPLED = [
    {
        "prompt": f"p{i}",
        "completions": [f" a{i}", f" b{i}", f" c{i}", f" d{i}"],
        "scores": [0.1, 0.7, 2.0, -1.0],
    }
    for i in range(10)
]


def test_tiers_pair_samples_or_the_better_sample_with_what_people_wrote(monkeypatch):
    monkeypatch.setattr(tiers, "reward", lambda text: -0.5)
    human = {f"p{i}": f" human {i}" for i in range(10)}
    high, medium, low = (tiers.candidates_of(tier, SAMPLED, human) for tier in ("high", "medium", "low"))
    assert high[0] == Candidate("p0", (" a0", " b0"), (0.1, 0.7))
    assert high[1] == Candidate("p0", (" c0", " d0"), (2.0, -1.0))
    assert low[0] == Candidate("p0", (" b0", " human 0"), (0.7, -0.5))
    assert low[1] == Candidate("p0", (" c0", " human 0"), (2.0, -0.5))
    assert medium[:10] == low[:10] and medium[10:] == high[10:]


def test_labels_follow_bradley_and_terry():
    """In 20,000 pairs with a difference of 1.2 the better one is chosen with probability sigmoid(1.2)."""
    candidates = [Candidate("p", (" better", " worse"), (1.0, -0.2))] * 20_000
    rows = tiers.labelled(candidates, seed=3)
    right = np.mean([row["chosen"] == " better" for row in rows])
    expected = 1 / (1 + math.exp(-1.2))
    assert abs(right - expected) < 4 * math.sqrt(expected * (1 - expected) / 20_000)
    assert all(row["margin"] == (1.2 if row["chosen"] == " better" else -1.2) for row in rows)
    assert tiers.labelled(candidates, seed=3) == rows != tiers.labelled(candidates, seed=4)


def test_equal_and_empty_completions_make_no_pair():
    candidates = [Candidate("p", pair, (0.0, 1.0)) for pair in ((" a", " a"), ("", " a"), (" a", " b"))]
    assert [{row["chosen"], row["rejected"]} for row in tiers.labelled(candidates, 0)] == [{" a", " b"}]


def test_noised_margins_are_off_by_their_own_spread():
    rows = [{"margin": float(x)} for x in np.random.default_rng(0).normal(scale=1.7, size=20_000)]
    errors = [b["margin"] - a["margin"] for a, b in zip(rows, tiers.noised(rows, 0.5, seed=1), strict=True)]
    assert np.std(errors) == pytest.approx(0.85, rel=0.03) and abs(np.mean(errors)) < 0.03


def test_an_estimate_counts_seeds_and_prompts_as_they_vary():
    """Standard errors of a mean over crossed effects, against the spread of that mean over many draws."""
    random = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(2000):
        values = random.normal(scale=0.3, size=(6, 1)) + random.normal(scale=1.0, size=(1, 40))
        values = values + random.normal(scale=0.8, size=(6, 40))
        found = estimate(values)
        means.append(found.mean)
        errors.append(found.error)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.06)


def test_differences_are_paired():
    """Effects of seeds and prompts that both samples share do not count."""
    random = np.random.default_rng(1)
    base = random.normal(scale=5, size=(5, 50))
    noise = random.normal(scale=0.01, size=(5, 50))
    one, other = (Sample(x, x, x) for x in (base + 0.2 + noise, base))
    found = difference(one, other)
    assert found.mean == pytest.approx(0.2, abs=0.005) and found.error < 0.005


def test_rewards_at_equal_kl_lie_between_the_betas():
    def sample(reward, kl):
        return Sample(np.full((2, 3), reward), np.full((2, 3), kl), np.ones((2, 3)))

    settings = {Setting("dpo", 0.1, "high"): sample(1.0, 4.0), Setting("dpo", 0.3, "high"): sample(0.4, 1.0)}
    found = at_equal_kl(settings, "dpo", "high", 2.25)
    assert found is not None and found == pytest.approx(np.full((2, 3), 0.7))
    assert at_equal_kl(settings, "dpo", "high", 9.0) is None
    assert at_equal_kl(settings, "dpo", "low", 2.0) is None


def test_results_are_read_by_arm_beta_tier_and_seed(tmp_path):
    for name, value in (("sft", 0.0), ("dpo_b0.1_high_1", 2.0), ("dpo_b0.1_high_0", 1.0)):
        record = {key: [value, value + 1] for key in ("rewards", "kls", "lengths")}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    (tmp_path / "dpo_b0.1_high_7.json").write_text("of an earlier run")
    (tmp_path / "runs.json").write_text('["dpo_b0.1_high_0", "dpo_b0.1_high_1"]')
    sft, settings = results.read(tmp_path)
    assert sft.rewards.tolist() == [[0, 1]]
    assert list(settings) == [Setting("dpo", 0.1, "high")]
    assert settings[Setting("dpo", 0.1, "high")].rewards.tolist() == [[1, 2], [2, 3]]
