"""The report holds what the runs' files say, escaped, in one page that fetches nothing."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from madpo.trainer.errors import UserError
from madpo.trainer.pair_margins import PairMargins, StoredPairs, write_pairs
from madpo.trainer.reports.run_report import write_report
from madpo.trainer.run_folder import read_metrics

UNDRAWN = ("step", "time", "epoch", "loss", "num_tokens")
"""Metrics of a run with only one chart."""


def make_run(
    folder: Path, steps: int = 12, weights: bool = True, only_loss: bool = False, **files: str
) -> Path:
    """A run folder whose values are functions of the step; `files`: config, run or data_report.

    With `only_loss`, of what has a chart: drawing is what takes time.
    """
    folder.mkdir(parents=True)
    lines: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        line = {
            "step": step,
            "time": 1000.0 + 60 * step,
            "epoch": step / steps,
            "loss": 0.7 - 0.01 * step,
            "grad_norm": 1.0 + 0.1 * step,
            "learning_rate": 1e-4 / step,
            "num_tokens": 1234 * step,
            "perf/tokens_per_second": 8000.0 + step,
            "rewards/accuracies": 0.5 + 0.01 * step,
            "rewards/margins": 0.1 * step,
            "rewards/chosen": 0.03 * step,
            "rewards/rejected": -0.07 * step,
            "kl": 0.001 * step,
        }
        if weights:
            line |= {
                "madpo/weight_mean": 1.04,
                "madpo/weight_min": 0.8,
                "madpo/weight_max": 1.2 + 0.001 * step,
            }
        lines.append({k: v for k, v in line.items() if k in UNDRAWN} if only_loss else line)
        if step % 4 == 0:
            lines.append({"step": step, "time": 1001.0 + 60 * step, "eval_loss": 1 - 0.01 * step})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(files.get("config", "seed: 42\n"))
    for name in ("run", "data_report"):
        if name in files:
            (folder / f"{name}.json").write_text(files[name])
    return folder


def write_lines(path: Path, *lines: dict[str, Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def page_of(*runs: Path) -> str:
    return write_report(runs, runs[0] / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def overlaid(tmp_path_factory) -> list[Path]:
    """Two runs and the report of both; not to be written into."""
    folder = tmp_path_factory.mktemp("overlaid")
    runs = [make_run(folder / "first"), make_run(folder / "second", steps=8, weights=False)]
    write_report(runs, runs[0] / "report.html")
    return runs


@pytest.fixture
def page(overlaid) -> str:
    return (overlaid[0] / "report.html").read_text(encoding="utf-8")


def charts_of(page: str) -> dict[str, str]:
    """Title of each chart -> its HTML."""
    figures = re.findall(r"<figure .*?</figure>", page, flags=re.DOTALL)
    return {re.findall("<h3>(.*?)</h3>", figure)[0]: figure for figure in figures}


def cells_of(page: str, name: str) -> list[str]:
    """The cells of the table row that starts with `name`."""
    found = re.search(rf"<tr><th>(?:<[^>]*>)*{re.escape(name)}(?:</span>)?</th>(.*)</tr>", page)
    assert found, f"no row {name}"
    return re.findall("<td>(.*?)</td>", found[1])


def test_read_metrics_skips_a_torn_last_line(tmp_path):
    lines = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}]
    path = write_lines(tmp_path / "metrics.jsonl", *lines)
    whole = path.read_text()
    for end in range(len(whole.splitlines()[0]) + 2, len(whole) - 1):
        path.write_text(whole[:end])
        assert read_metrics(tmp_path) == lines[:1]
    path.write_text(whole[:-1])
    assert read_metrics(tmp_path) == lines


@pytest.mark.parametrize("broken", ['{"step": 2, "lo', "", "[1, 2]", '{"loss": 1.0}', '{"step": "1"}', "7"])
def test_read_metrics_names_a_broken_line(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{broken}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: ")):
        read_metrics(tmp_path)


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "lo'])
def test_without_metrics_the_error_says_what_to_do(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    expected = re.escape(str(tmp_path / "metrics.jsonl")) + ": no metrics; name the folder of a run"
    with pytest.raises(ValueError, match=expected):
        write_report([tmp_path], tmp_path / "report.html")


@pytest.mark.parametrize("value", ['"soon"', "[]", "NaN", "1e300", "-1", "null"])
def test_a_time_that_is_none_is_named(tmp_path, value):
    run = make_run(tmp_path / "run", run=f'{{"started": {value if value != "null" else "{}"}}}')
    with pytest.raises(UserError, match=rf"^{run}/run.json: started: expected seconds since 1970, got "):
        page_of(run)
    other = make_run(tmp_path / "other")
    with (other / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": 13, "time": {value}, "loss": 1.0}}\n')
    with pytest.raises(UserError, match=rf"^{other}/metrics.jsonl: time at step 13: expected seconds since "):
        page_of(other)


@pytest.mark.parametrize("record", ['{"step": 13, "loss": "low"}', '{"step": 13, "eval_loss": [1]}'])
def test_a_metric_that_is_no_number_is_named(tmp_path, record):
    run = make_run(tmp_path / "run", run='{"total_steps": null}')
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f"{record}\n")
    with pytest.raises(UserError, match=rf"^{run}/metrics.jsonl: \w+ at step 13: expected a number, got "):
        page_of(run)


@pytest.mark.parametrize("content", ["{", "[]", '{"total_steps": "all"}'])
def test_an_unreadable_run_json_is_named(tmp_path, content):
    run = make_run(tmp_path / "run", run=content)
    with pytest.raises(ValueError, match=re.escape(f"{run / 'run.json'}: ")):
        page_of(run)


def test_a_run_that_was_cut_off_is_reported_into_a_new_folder(tmp_path):
    run = make_run(tmp_path / "run", only_loss=True)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    output = tmp_path / "new" / "folder" / "out.html"
    assert write_report([run], output) == output
    assert cells_of(output.read_text(encoding="utf-8"), "step") == ["12"]


def test_page_fetches_nothing(page):
    links = set(re.findall(r"https?://[^\s\"'<>)]*", page))
    assert links <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"<(link|img|iframe|image|object|base)\b|\bsrc\s*=|@import|\bfetch\b", page)
    assert page.count("<script>") == page.count("<script") == 1
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_ids_are_unique_and_every_reference_has_its_target(page):
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert ids and len(ids) == len(set(ids))
    references = re.findall(r'(?:href="|url\()#([^")]*)', page)
    assert references and set(references) <= set(ids)


def test_same_input_gives_the_same_bytes(overlaid, page, tmp_path):
    assert write_report(overlaid, tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_runs_share_charts_with_a_legend_by_folder_name(page):
    charts = charts_of(page)
    assert "first</span>" in charts["Loss"] and "second</span>" in charts["Loss"]
    assert "second</span>" not in charts["MADPO weights"]
    assert cells_of(page, "loss") == ["0.58", "0.62"]
    assert cells_of(page, "madpo/weight_mean") == ["1.04", ""]


def test_runs_of_one_folder_name_are_told_apart_by_path(tmp_path):
    page = page_of(*(make_run(tmp_path / name / "run", only_loss=True) for name in "ab"))
    assert cells_of(page, "a/run") == cells_of(page, "b/run")
    assert cells_of(page, "loss") == ["0.58", "0.58"]


def test_one_run_has_a_legend_only_where_training_and_evaluation_meet(tmp_path):
    charts = charts_of(page_of(make_run(tmp_path / "run")))
    assert "training</span>" in charts["Loss"] and "held out</span>" in charts["Loss"]
    assert "<span>" not in charts["Margin"]
    assert "chosen</span>" in charts["Rewards"] and "rejected</span>" in charts["Rewards"]


def test_charts_are_those_that_have_data(page, tmp_path):
    assert len(charts_of(page)) == 9
    without = charts_of(page_of(make_run(tmp_path / "dpo", weights=False)))
    assert charts_of(page).keys() - without.keys() == {"MADPO weights"}
    write_lines(tmp_path / "sft" / "metrics.jsonl", {"step": 1, "loss": 2.0})
    assert list(charts_of(page_of(tmp_path / "sft"))) == ["Loss"]


def test_values_that_are_not_finite_and_single_points_are_drawn(tmp_path):
    write_lines(
        tmp_path / "run" / "metrics.jsonl",
        {"step": 1, "loss": math.nan, "grad_norm": math.inf, "kl": 0.5},
        {"step": 2, "loss": 1.0, "grad_norm": 1.0},
    )
    assert list(charts_of(page_of(tmp_path / "run"))) == ["Loss", "Squared log-ratio", "Gradient norm"]


def test_tables_show_facts_and_the_last_value_of_every_metric(tmp_path):
    facts = {
        "command": "madpo train configs/demo.yaml",
        "started": 1000.0,
        "versions": {"torch": "2.13.0"},
        "extended": [[8, "train.max_steps 8 -> 12"]],
        "none_of_these": [],
    }
    train = {"rows": 10531, "dropped": {"too long": 3}, "where": {"too long": ["x.jsonl:7"]}}
    data = {"train": train, "test": {"rows": 1218}}
    run = make_run(tmp_path / "demo", run=json.dumps(facts), data_report=json.dumps(data))
    page = page_of(run)
    assert cells_of(page, "demo") == ["12", "1", "14,808", "0:12:01", "0.8800"]
    assert cells_of(page, "learning_rate") == ["8.333e-06"]
    assert cells_of(page, "eval_loss") == ["0.88"]
    assert "<pre>madpo train configs/demo.yaml</pre>" in page
    assert cells_of(page, "versions: torch") == ["2.13.0"]
    assert cells_of(page, "extended") == ["8, train.max_steps 8 -&gt; 12"] and "none_of_these" not in page
    assert cells_of(page, "started") == ["1970-01-01 00:16 UTC"]
    assert cells_of(page, "rows") == ["10,531", "1,218"]
    assert cells_of(page, "dropped: too long") == ["3", ""] and "x.jsonl" not in page
    assert "<pre>seed: 42\n</pre>" in page


def test_the_page_is_light_or_dark_as_the_reader_has_it_and_drawings_take_its_colours(page):
    assert "@media (prefers-color-scheme: dark)" in page and '<meta name="color-scheme"' in page
    style, drawings = page.split("</style>", 1)
    assert "--c0: #2f6db5" in style and "--c0: #6ea8ee" in style
    assert "var(--c0)" in drawings and not re.search(r"#[0-9a-f]{6}\b", drawings)


def test_the_first_line_says_what_happened_and_the_table_has_the_errors(tmp_path):
    run = make_run(tmp_path / "demo", only_loss=True, run='{"total_steps": 12}')
    first = {"step": 4, "eval_loss": 0.69, "eval_rewards/accuracies": 0.5, "eval_rewards/margins": 0.01}
    last = {"step": 8, "eval_loss": 0.65, "eval_rewards/accuracies": 0.612, "eval_rewards/margins": 0.21}
    last |= {"eval_num_pairs": 1218, "eval_rewards/accuracies_stderr": 0.014}
    write_lines(run / "metrics.jsonl", first, last, {"step": 12, "loss": 0.6})
    page = page_of(run)
    sentence = "Held-out accuracy 50.0% (step 4) → 61.2% ± 1.4 at step 8 of 12; "
    sentence += "held-out loss 0.690 → 0.650; finished."
    assert f'<p class="happened">{sentence}</p>' in page
    assert cells_of(page, "demo")[-3:] == ["0.6120 ± 0.0140", "0.2100", "0.6500"]
    assert "over 1,218 held-out pairs" in page
    assert cells_of(page, "eval_rewards/accuracies") == ["0.612 ± 0.014"]


def test_runs_are_compared_pair_by_pair_and_other_data_is_a_warning(tmp_path):
    runs = []
    for name, margins, rows in (("a", [-1.0, 1.0, -2.0, 3.0], 8), ("b", [1.0, 1.0, -1.0, 4.0], 9)):
        run = make_run(tmp_path / name, only_loss=True, data_report=json.dumps({"train": {"rows": rows}}))
        pairs = PairMargins(np.array(margins), np.ones(4, np.int64))
        record = {f"eval_{key}": value for key, value in pairs.metrics().items()}
        means = {"eval_rewards/accuracies": float(np.mean(np.array(margins) > 0))}
        write_lines(run / "metrics.jsonl", {"step": 3, "eval_loss": 0.6, **means, **record})
        write_pairs(run, StoredPairs(3, "the same", pairs))
        runs.append(run)
    page = page_of(*runs)
    table = page[page.index("<h3>Difference to a</h3>") :]
    error = np.std([1, 0, 0, 0]) / 2
    assert cells_of(table, "b")[0] == f"+0.2500 ± {error:.4f}"
    assert cells_of(table, "b")[2] == "pair by pair, 4"
    assert "b and a have different data (train: 8 rows against 9 rows)." in page


def test_runs_beyond_the_palette_have_line_styles_of_their_own(tmp_path):
    runs = []
    for number in range(11):
        folder = tmp_path / f"run-{number}"
        runs.append(write_lines(folder / "metrics.jsonl", {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}))
    legend = charts_of(page_of(*(path.parent for path in runs)))["Loss"]
    marks = re.findall(r'<i class="(\w+)" style="color: var\((--c\d)\)"></i>run', legend)
    assert len(set(marks)) == 11


def test_a_flat_data_report_has_one_column(tmp_path):
    page = page_of(
        make_run(tmp_path / "run", only_loss=True, data_report='{"rows": 5, "dropped": {"empty": 1}}')
    )
    assert cells_of(page, "rows") == ["5"]
    assert cells_of(page, "dropped: empty") == ["1"]


def test_text_from_files_is_escaped(tmp_path):
    evil = "<script>alert('$x$ {y} & \"z\"')</script>"
    run = make_run(
        tmp_path / "_<b>$run$",
        config=f"name: {evil}\n",
        run=json.dumps({"command": evil, "device": evil, evil: evil}),
        data_report=json.dumps({evil: {evil: evil}}),
    )
    write_lines(run / "metrics.jsonl", {"step": 1, "loss": 1.0, evil: 2.0})
    page = page_of(run, make_run(tmp_path / "other", only_loss=True))
    assert page.count("<script") == 1 and "<b>$run" not in page
    assert page.count("&lt;script&gt;") == 9
    assert "_&lt;b&gt;$run$</span>" in charts_of(page)["Loss"]
