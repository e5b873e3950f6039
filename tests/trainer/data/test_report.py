"""The report of a data set."""

from __future__ import annotations

import json

from text_cases import config_for

from madpo.trainer.data.tokenised_cache import load_groups


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
