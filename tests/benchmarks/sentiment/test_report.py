"""The sentiment report on made-up results: what it says of orders, equal KL and reward models."""

from __future__ import annotations

import json

import numpy as np
import pytest

from madpo.benchmarks.sentiment import report

REWARDS = {"madpo": 1.5, "beta-dpo": 1.2, "dpo": 1.0, "ipo": 1.3, "mixdpo": 0.9}
SEEDS, PROMPTS = 3, 200


@pytest.fixture
def results(tmp_path):
    random = np.random.default_rng(0)
    folder = tmp_path / "results"
    folder.mkdir()
    prompts = random.normal(size=PROMPTS)

    def put(name, reward, kl):
        rewards = reward + prompts + random.normal(scale=0.3, size=PROMPTS)
        record = {"rewards": rewards.tolist(), "kls": [kl] * PROMPTS, "lengths": [20] * PROMPTS}
        (folder / f"{name}.json").write_text(json.dumps(record))

    put("sft", 0.3, 0.0)
    for seed in range(SEEDS):
        for arm, reward in REWARDS.items():
            put(f"{arm}_b0.1_high_{seed}", reward, 4.0)
        put(f"madpo_b0.3_high_{seed}", 0.7, 1.0)
        put(f"dpo_b0.3_high_{seed}", 0.6, 2.0)
        put(f"madpo-oracle_b0.1_high_{seed}", 1.5, 4.0)
    runs = [path.stem for path in folder.glob("*_*.json")]
    (folder / "runs.json").write_text(json.dumps(runs))
    return folder


@pytest.fixture
def text(tmp_path, results, capsys):
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    fact = {"pairs": 100, "label_agrees_with_oracle": 0.6, "abs_margin_quartiles": [0.1, 0.9, 1.7]}
    facts = {f"{tier} 0": fact for tier in report.TIERS}
    (pairs / "facts.json").write_text(json.dumps(facts))
    margins = tmp_path / "margins_high_0" / "annotated"
    margins.mkdir(parents=True)
    for split, factor in (("train", 2.0), ("test", -2.0)):
        rows = [{"margin": factor * m, "margin_given": m} for m in (0.5, -1.0, 2.0)]
        (margins / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "margins_high_9" / "annotated").mkdir(parents=True)  # a seed that is no longer in the recipe
    report.write(tmp_path / "out", str(results), str(pairs), str(tmp_path), [0], "Made up")
    return (tmp_path / "out" / "sentiment.md").read_text()


def row(text: str, *starts: str) -> list[str]:
    (line,) = [x for x in text.splitlines() if x.startswith("| " + " | ".join(starts) + " |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_gives_rewards_paired_differences_and_the_papers_numbers(text):
    text = text[: text.index("## MADPO with other margins")]
    cells = row(text, "high", "MADPO")
    assert float(cells[2].split()[0]) == pytest.approx(1.5, abs=0.2)
    difference, error = (float(x) for x in cells[3].split("±"))
    assert difference == pytest.approx(0.5, abs=4 * error) and error < 0.06
    assert cells[6:] == ["2.23", "+0.61"]
    assert row(text, "high", "MixDPO")[6:] == ["", ""]


def test_orders_that_are_seen_reversed_or_not_told_apart_are_called_so(text):
    (line,) = [x for x in text.splitlines() if x.startswith("- high:")]
    assert "MADPO > β-DPO: yes" in line and "β-DPO > DPO: yes" in line
    assert "DPO > IPO: **no, reversed**" in line
    assert not any(x.startswith("- medium:") for x in text.splitlines())


def test_methods_are_compared_at_equal_kl(text, tmp_path):
    """DPO's betas reach the KL of MADPO at beta 0.1, and not MADPO's other KL."""
    section = text[text.index("## Against DPO at the same KL") :]
    assert float(row(section, "high", "MADPO, τ quantile", "0.1")[6].split()[0]) == pytest.approx(
        0.5, abs=0.1
    )
    assert row(section, "high", "MADPO, τ quantile", "0.3")[5:] == ["DPO's KLs are 2.0 to 4.0", ""]
    assert (tmp_path / "out" / "frontier.svg").stat().st_size > 1000


def test_reward_models_are_judged_by_their_agreement_with_the_oracle(text):
    cells = row(text[text.index("## The pairs") :], "high", "100")
    assert cells[4:] == ["1.00", "-1.00", "3.20"]
