"""The step's benchmark: equal work, a wrong contender without a speed, and its files."""

import json
import math
from dataclasses import asdict, replace
from importlib.util import find_spec

import numpy as np
import pytest
from commands import command

from madpo.benchmarks.step import report as step_report
from madpo.benchmarks.step import run as step
from madpo.benchmarks.step import scaling as step_scaling
from madpo.benchmarks.step import workload as step_workload
from madpo.benchmarks.step.pair_source import PairSource
from madpo.benchmarks.step.worker import Block
from madpo.trainer.batches.cost import Cost
from madpo.trainer.batches.micro_batches import plan_micro_batches
from madpo.trainer.errors import UserError

MINI = step_workload._llama(32, 64, 2, (4, 2), 500)


def mini_settings(contenders=(), ranks=1, lora=False) -> step.Settings:
    what = step.make_settings("mini", "hh", lora, ranks, 4, 96, "float32", 2, ranks, contenders)
    return replace(what, warmup=1, lr=1e-3, trl_batch_sizes=what.trl_batch_sizes[-1:])


@pytest.fixture(autouse=True)
def mini(monkeypatch):
    monkeypatch.setitem(step_workload.MODELS, "mini", MINI)


def log(_: str) -> None:
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "lora", "names"),
    [
        (1, False, ["madpo", "madpo without packing"]),
        (2, False, ["madpo", "madpo without packing", "madpo without balance"]),
        (2, True, ["madpo", "madpo, reference cached", "madpo without one traversal"]),
    ],
)
def test_a_feature_that_is_off_costs_time_and_changes_no_loss(ranks, lora, names, tmp_path):
    if lora:
        pytest.importorskip("peft")
    (rows,) = step.run(mini_settings(names, ranks, lora), tmp_path, log)
    assert [row.contender for row in rows] == names
    assert all(row.refused is None and row.tokens_per_second and row.peak_mib for row in rows)
    assert rows[0].loss != pytest.approx(math.log(2), abs=1e-5), "it trains"
    assert all(row.loss_gap is not None and row.loss_gap < 1e-5 for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")
@pytest.mark.parametrize(("ranks", "lora"), [(1, False), (2, False), (1, True)])
def test_trl_and_we_do_the_same_work(ranks, lora, tmp_path):
    if lora:
        pytest.importorskip("peft")
    (rows,) = step.run(mini_settings(["TRL", "madpo"], ranks, lora), tmp_path, log)
    assert [row.contender.split(",")[0] for row in rows] == ["TRL", "madpo"]
    assert rows[1].refused is None and rows[1].times_first
    assert rows[1].loss_gap is not None and rows[1].loss_gap < 2e-5
    assert rows[1].loss != pytest.approx(math.log(2), abs=1e-5), "it trains"


@pytest.mark.slow
def test_where_each_needs_all_of_the_memory_one_comes_after_the_other(tmp_path):
    what = replace(mini_settings(["madpo", "madpo, reference cached"]), together=False)
    first, both = step.run(what, tmp_path, log)
    assert [row.contender for row in both] == ["madpo", "madpo, reference cached"]
    assert first == both[:1] and both[1].times_first and both[1].refused is None


@pytest.mark.parametrize(
    ("times", "tried"),
    [
        ({1: 9, 2: 8, 4: 7, 8: 6, 16: 5, 32: 6, 64: 1}, [8, 16, 32]),
        ({1: 9, 2: 8, 4: 5, 8: 6, 16: math.inf}, [8, 16, 4, 2]),
        ({1: 5, 2: 6, 4: 7}, [4, 2, 1]),
        ({1: 5}, [1]),
    ],
)
def test_micro_batches_are_tried_for_as_long_as_they_get_faster(times, tried):
    assert step.climb(list(times), lambda size: [times[size]]) == {size: times[size] for size in tried}


def test_rates_count_tokens_without_padding_and_wrong_losses_have_none(tmp_path):
    what = replace(mini_settings(), rounds=2, warmup=1, pairs=2)
    workload = step_workload.make_workload(tmp_path, "mini", "hh", 6, 96)
    slow = [Block(9.0, 9.0, 0.7, 0), Block(4.0, 4.0, 0.6, 0), Block(4.0, 4.0, 0.5, 2**20)]
    fast = [Block(9.0, 9.0, 0.7, 0), Block(1.0, 1.0, 0.6, 0), Block(2.0, 2.0, 0.50001, 2**21)]
    wrong = [*fast[:2], Block(1.0, 1.0, 0.51, 0)]
    rounds = {"a": slow, "b": fast, "c": wrong}
    jobs = dict.fromkeys(rounds, step._job(what, workload))
    rows = list(step._rows(what, workload, jobs, rounds, {"d": "failed: memory"}))
    pairs = workload.pairs()
    tokens = [sum(2 * len(p) + len(c) + len(r) for p, c, r in pairs[i : i + 2]) for i in (2, 4)]
    assert rows[1].tokens_per_second == pytest.approx(np.median([tokens[0] / 1.0, tokens[1] / 2.0]))
    assert (rows[0].times_first, rows[1].times_first, rows[1].cpu_times_first) == (1.0, 3.0, 3.0)
    assert (rows[1].step_seconds, rows[1].peak_mib, rows[1].loss) == (1.5, 2.0, 0.50001)
    assert rows[2].refused == "wrong: its loss is off by 1.0e-02" and rows[2].tokens_per_second is None
    assert rows[3].refused == "failed: memory"


@pytest.mark.parametrize("name", list(step_workload.DATA))
def test_lengths_have_the_published_medians(name):
    lengths = step_workload.DATA[name]
    pairs = step_workload.draw_pairs(lengths, 2000, 2048, 500, seed=1)
    prompts, chosen = (np.array([len(pair[part]) for pair in pairs]) for part in (0, 1))
    assert np.median(prompts) == pytest.approx(lengths.prompt, rel=0.05)
    assert np.median(chosen) == pytest.approx(lengths.completion, rel=0.05)
    assert np.median(prompts + chosen) == pytest.approx({"ultrafeedback": 409, "hh": 186}[name], rel=0.1)
    cut = step_workload.draw_pairs(lengths, 200, 128, 500, seed=1)
    assert max(len(prompt) + len(tail) for prompt, *tails in cut for tail in tails) == 128


@pytest.mark.parametrize(("packing", "micro_batches"), [("balanced", 1), ("counted", 1), ("alone", 3)])
def test_pairs_that_claim_to_be_alike_are_spread_by_number(packing, micro_batches):
    pairs = [([1] * 8, [2] * length, [3] * length) for length in (100, 1, 1, 1, 1, 1)]
    groups, indices = PairSource(pairs, packing, budget=4096).take(0, 6)
    shapes = groups.shapes(indices)
    costs = Cost(per_token=1.0, per_row=1.0, per_attention_pair={None: 1.0}).of(shapes)
    plan = plan_micro_batches(shapes.tokens(), 4096, 2, costs)
    sizes = sorted(len(micro) for rank in plan for micro in rank)
    assert sizes == {"balanced": [1, 5], "counted": [3, 3], "alone": [1] * 6}[packing]
    assert [len(rank) for rank in plan] == [micro_batches] * 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"contenders": ["Axolotl"]}, "--contender Axolotl: unknown; choose from TRL"),
        ({"dtype": "fp8"}, "--dtype fp8"),
        ({"ranks": 2, "pairs": 3}, "--pairs 3"),
    ],
)
def test_settings_that_cannot_be_are_named(changes, named):
    given = {
        "model": "tiny",
        "data": "hh",
        "lora": False,
        "ranks": 1,
        "pairs": 4,
        "max_length": 96,
        "dtype": None,
        "rounds": 1,
        "threads": 1,
        "contenders": [],
    }
    with pytest.raises(UserError, match=named):
        step.make_settings(**(given | changes))


def test_keys_are_one_more_contender():
    what = mini_settings(["objective.beta=0.3 model.prefix_sharing=false"])
    assert what.variants["madpo"].overrides == () and len(what.variants) == 6
    *_, (name, variant) = what.variants.items()
    assert name == "madpo, objective.beta=0.3 model.prefix_sharing=false"
    assert variant.overrides == ("objective.beta=0.3", "model.prefix_sharing=false")


@pytest.mark.parametrize(("option", "value"), [("--model", "GPT-5"), ("--data", "wiki")])
def test_the_command_names_what_it_does_not_know(option, value, tmp_path):
    status, _, said = command("bench", "step", option, value, "--output", str(tmp_path))
    assert status == 2 and said.splitlines()[-1].startswith(f"error: {option} {value}")


ROW = step.Row(
    *("tiny", "hh", False, 1, 8, "float32", "madpo"),
    step_seconds=0.5,
    p25=0.4,
    p75=0.6,
    tokens_per_second=1e4,
    tflops=0.1,
    times_first=1.0,
    peak_mib=100.0,
    loss=0.69,
    loss_gap=0.0,
)


def test_a_screen_shows_the_columns_that_it_has_room_for():
    rows = [asdict(ROW), asdict(replace(ROW, contender="madpo without prefix sharing"))]
    assert list(step_report.that_fit(rows, 60)) == ["contender", "step_seconds", "times_first"]
    assert list(step_report.that_fit(rows, 95))[-1] == "loss"
    assert step_report.that_fit(rows, 200).keys() == step_report.columns_of(rows).keys()


def test_results_of_one_day_are_kept_together(tmp_path):
    found, row = step_report.facts("madpo bench step"), ROW
    step_report.write(tmp_path, found, [row])
    step_report.write(tmp_path, found, [replace(row, data="ultrafeedback")])
    path, markdown = step_report.write(tmp_path, found, [replace(row, step_seconds=0.25, refused=None)])
    rows = json.loads(path.read_text())["rows"]
    assert [(r["data"], r["step_seconds"]) for r in rows] == [("ultrafeedback", 0.5), ("hh", 0.25)]
    text = markdown.read_text()
    assert "## tiny, hh lengths, 8 pairs a step, float32, 1 rank" in text and "| madpo | 0.25 |" in text


@pytest.mark.slow
def test_scaling_measures_every_size(tmp_path):
    times = list(step_scaling.times(tmp_path / "work", "mini", 1, log, sizes=(64, 128)))
    memory = list(step_scaling.memory("mini", log, counts=(2, 4)))
    assert [time.tokens for time in times] == [64, 128] and all(t.seconds > t.attention > 0 for t in times)
    assert [(m.pairs, m.rows) for m in memory] == [(2, 800), (4, 1600)]
    path, markdown = step_scaling.write(tmp_path, step_scaling.facts("madpo"), times, memory)
    assert len(json.loads(path.read_text())["time"]) == 2
    assert markdown.read_text().count("\n|") == 8
