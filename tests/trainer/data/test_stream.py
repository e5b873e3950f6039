"""Streams: blocks in order, shuffled inside, the same whenever and by whomever they are asked for."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
from harness import make_config, run_ranks, save_model, without_clock, write_pairs
from patience import patient
from small_runs import cut_off
from transformers import AutoTokenizer

from madpo.trainer.checkpoints.folders import checkpoints_in
from madpo.trainer.config.schema import Config
from madpo.trainer.data.block_reader import RowReader, open_reader
from madpo.trainer.data.source import load_by_name
from madpo.trainer.data.stream import Stream
from madpo.trainer.data.tokenised_cache import load_groups
from madpo.trainer.data.training_data import load_data
from madpo.trainer.data.training_source import DatasetSource, TrainingSource
from madpo.trainer.files import SAMPLE_BYTES, SAMPLES, sampled_content
from madpo.trainer.stages.annotate import run_annotation
from madpo.trainer.stages.probe import run_probe
from madpo.trainer.stages.train import run_training

ROWS, BLOCK = 23, 5
PASS = 10**9  # an end of the run that is never reached


@pytest.fixture
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def config_for(folder: Path, path: Path, **sections: Any) -> Config:
    data = {"dataset_name": str(path), "streaming": True, "stream_block": BLOCK, **sections.pop("data", {})}
    train = {"max_steps": 7, **sections.pop("train", {})}
    model = {"model_name_or_path": "unused", **sections.pop("model", {})}
    return make_config(folder, {"model": model, "data": data, "train": train, **sections})


def stream_of(config: Config, tokenizer, reader=None, end: int = 0, **options: Any) -> Stream:
    reader = reader or open_reader(config.data, "train")
    return Stream(reader, config.data, "train", tokenizer, config.seed, end, **options).opened()


def taken(source: TrainingSource, consumed: int, count: int) -> list[str]:
    groups, indices = source.take(consumed, count)
    assert len(indices) == count
    return [repr(groups[index]) for index in indices]


def whole(config: Config, tokenizer) -> list[str]:
    """The groups of the source in its order, by the ordinary way."""
    groups, _ = load_groups(config.data, "train", tokenizer)
    return [repr(groups[index]) for index in range(len(groups))]


def as_lines(folder: Path) -> tuple[Path, Any]:
    return write_pairs(folder / "set" / "train.jsonl", ROWS).parent, None


def as_shards(folder: Path) -> tuple[Path, Any]:
    """Two .parquet files, whose ends and row groups are no ends of blocks."""
    path = write_pairs(folder / "pairs.jsonl", ROWS)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    (folder / "shards").mkdir()
    for number, part in enumerate((rows[:13], rows[13:])):
        file = folder / "shards" / f"train-{number:05d}-of-00002.parquet"
        datasets.Dataset.from_list(part).to_parquet(str(file), batch_size=4)
    return folder / "shards", None


def by_name(folder: Path) -> tuple[Path, Any]:
    """A data set by name: `datasets` finds the files itself, here in a folder."""
    path, _ = as_shards(folder)
    rows = load_by_name(config_for(folder, path).data, "train", streaming=True)
    return path, RowReader("some/set[train]", rows)


SOURCES = {"jsonl": as_lines, "parquet": as_shards, "by-name": by_name}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_every_group_comes_once_per_epoch_and_in_the_order_of_the_blocks(tmp_path, tokenizer, make):
    path, reader = make(tmp_path)
    config = config_for(tmp_path, path)
    want, stream = whole(config, tokenizer), stream_of(config, tokenizer, reader)
    epochs = [taken(stream, epoch * ROWS, ROWS) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(want)
        for start in range(0, ROWS, BLOCK):
            assert sorted(epoch[start : start + BLOCK]) == sorted(want[start : start + BLOCK])
    assert epochs[0] != want and epochs[0] != epochs[1] != epochs[2]
    firsts = [[want.index(x) - start for x in epochs[0][start : start + BLOCK]] for start in (0, BLOCK)]
    assert firsts[0] != firsts[1], "every block has a permutation of its own"


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("emptied", [False, True], ids=["cache", "emptied"])
def test_a_place_is_found_again_from_the_number_of_groups_consumed(tmp_path, tokenizer, make, emptied):
    path, reader = make(tmp_path)
    config = config_for(tmp_path, path)
    want = taken(stream_of(config, tokenizer, reader), 0, 4 * ROWS)
    for consumed, count in ((0, 3), (4, 8), (5, 5), (22, 2), (23, 5), (50, 31)):
        if emptied:
            shutil.rmtree(config.data.cache_dir)
        fresh = stream_of(config, tokenizer, reader)
        assert taken(fresh, consumed, count) == want[consumed : consumed + count]
    back = stream_of(config, tokenizer, reader)
    for consumed in (60, 3, 41, 0):
        assert taken(back, consumed, 4) == want[consumed : consumed + 4]


def test_tables_that_were_removed_are_made_again_from_the_notes(tmp_path, tokenizer):
    """Only the records of the blocks before the position are read."""
    config = config_for(tmp_path, as_lines(tmp_path)[0])
    want = taken(stream_of(config, tokenizer), 0, ROWS)
    folder = next(Path(config.data.cache_dir).glob("stream-*"))
    for table in folder.glob("block-*/"):
        shutil.rmtree(table)
    assert taken(stream_of(config, tokenizer), 17, 6) == want[17:]
    left = [int(table.name.removeprefix("block-")) for table in folder.glob("block-*/")]
    assert sorted(left) == [0, 3, 4]


def test_a_damaged_block_is_made_anew_and_named(tmp_path, tokenizer, capsys):
    path, _ = as_lines(tmp_path)
    config = config_for(tmp_path, path)
    want = taken(stream_of(config, tokenizer), 0, BLOCK)
    (table,) = (Path(config.data.cache_dir) / next(Path(config.data.cache_dir).glob("stream-*"))).glob(
        "block-00000000/data*.arrow"
    )
    content = bytearray(table.read_bytes())
    content[len(content) // 2] ^= 1
    table.write_bytes(content)
    assert taken(stream_of(config, tokenizer), 0, BLOCK) == want
    assert capsys.readouterr().err.count("damaged cache") == 1


def test_a_stream_of_one_block_is_the_ordinary_order(tmp_path, tokenizer):
    config = config_for(tmp_path, as_lines(tmp_path)[0], data={"stream_block": ROWS})
    groups, read = load_groups(config.data, "train", tokenizer)
    report = read()
    ordinary = DatasetSource(groups, config.seed, "shuffled", lambda: {"train": report})
    stream = stream_of(config, tokenizer)
    assert taken(stream, 7, 60) == taken(ordinary, 7, 60)
    reports = [source.report()["train"] for source in (stream, ordinary)]
    assert "1 blocks" in reports[0].pop("source") and reports[1].pop("source")
    assert reports[0] == reports[1]


def test_as_is_keeps_the_order_of_the_source(tmp_path, tokenizer):
    config = config_for(tmp_path, as_lines(tmp_path)[0], data={"order": "as_is"})
    want = whole(config, tokenizer)
    assert taken(stream_of(config, tokenizer), 0, 2 * ROWS) == want + want


def test_the_report_grows_with_what_was_read_and_ends_as_that_of_the_whole(tmp_path, tokenizer):
    config = config_for(tmp_path, as_lines(tmp_path)[0])
    stream = stream_of(config, tokenizer)
    assert stream.report()["train"]["rows"] == BLOCK
    stream.take(0, 2 * ROWS)
    report, want = stream.report()["train"], load_groups(config.data, "train", tokenizer)[1]()
    del report["source"], want["source"]
    assert report.pop("margin_mean") == pytest.approx(want.pop("margin_mean"))
    assert report == want


def spoil(path: Path, *numbers: int) -> None:
    lines = path.read_text().splitlines()
    for number in numbers:
        lines[number - 1] = '{"prompt": "a", "chosen": 3, "rejected": "c"}'
    path.write_text("\n".join(lines) + "\n")


def test_a_bad_row_stops_the_run_when_its_block_is_read_and_not_before(tmp_path, tokenizer):
    path = write_pairs(tmp_path / "pairs.jsonl", ROWS)
    spoil(path, 12)
    stream = stream_of(config_for(tmp_path, path), tokenizer)
    stream.take(0, 10)
    for _ in range(2):  # the second time from the cache
        with pytest.raises(ValueError, match=r"pairs\.jsonl:12: chosen: expected text"):
            stream.take(8, 4)
    dropping = stream_of(config_for(tmp_path, path, data={"on_bad_row": "drop"}), tokenizer)
    dropping.take(0, ROWS)
    assert dropping.report()["train"]["dropped"] == {"unreadable": 1}


def test_a_bad_row_of_a_table_is_named_by_its_place_in_the_whole(tmp_path, tokenizer):
    rows = [json.loads(x) for x in write_pairs(tmp_path / "x.jsonl", ROWS).read_text().splitlines()]
    rows[17]["chosen"] = ""
    path = tmp_path / "pairs.parquet"
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    with pytest.raises(ValueError, match=r"pairs\.parquet row 17: chosen is empty"):
        stream_of(config_for(tmp_path, path), tokenizer).take(0, ROWS)


def test_a_block_without_a_group_is_passed_over_but_never_its_bad_rows(tmp_path, tokenizer):
    path = write_pairs(tmp_path / "pairs.jsonl", ROWS)
    spoil(path, 6, 7, 8, 9, 10)
    config = config_for(tmp_path, path)
    with pytest.raises(ValueError, match=r"pairs\.jsonl:6: chosen: expected text .* \(5 bad rows of 5\)"):
        stream_of(config, tokenizer).take(0, 6)
    config = config_for(tmp_path, path, data={"on_bad_row": "drop"})
    assert sorted(taken(stream_of(config, tokenizer), 0, 18)) == sorted(whole(config, tokenizer))


def test_a_source_without_a_group_is_refused_with_numbers(tmp_path, tokenizer):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a:", "chosen": " b", "rejected": " b"}\n' * 7)
    with pytest.raises(
        ValueError, match=r"none of 7 rows can be trained on \(7: .*same tokens \(first: .*:1\)\)"
    ):
        stream_of(config_for(tmp_path, path), tokenizer)
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="the file has no rows"):
        stream_of(config_for(tmp_path, path), tokenizer)
    with pytest.raises(ValueError, match="no such file"):
        stream_of(config_for(tmp_path, tmp_path / "no.jsonl"), tokenizer)


def test_blocks_too_small_for_the_objective_are_dropped_and_counted(tmp_path, tokenizer):
    """A completion for another prompt needs two groups; 21 rows leave a last block of one."""
    config = config_for(tmp_path, write_pairs(tmp_path / "pairs.jsonl", 21), objective={"loss_type": "kto"})
    source = load_data(config, tokenizer, training=True).source
    assert source is not None
    first = taken(source, 0, 20)
    assert len(set(first)) == 20 and set(taken(source, 20, 20)) == set(first)
    report = source.report()["train"]
    assert report["dropped"] == {"too few in a block": 1} and report["groups"] == 20


def test_what_a_block_must_hold_is_checked_when_it_is_read(tmp_path, tokenizer):
    path = write_pairs(tmp_path / "pairs.jsonl", ROWS)
    lines = path.read_text().splitlines()
    lines[13] = '{"prompt": "a", "chosen": " b", "rejected": " c"}'
    path.write_text("\n".join(lines))
    config = config_for(tmp_path, path, objective={"loss_type": "madpo"})
    source = load_data(config, tokenizer, training=True).source
    assert source is not None
    source.take(0, 10)
    with pytest.raises(ValueError, match="1 of 5 rows have no margin"):
        source.take(10, 1)


def test_a_file_that_changes_under_a_run_is_refused(tmp_path, tokenizer):
    for path in (as_lines(tmp_path)[0], as_shards(tmp_path)[0]):
        stream = stream_of(config_for(tmp_path, path), tokenizer)
        file = sorted(path.iterdir())[-1]
        file.write_bytes(file.read_bytes() + b"\n")
        with pytest.raises(ValueError, match="changed while it was being read"):
            stream.take(0, ROWS)


def test_a_stream_is_known_by_its_content_and_not_by_its_place(tmp_path, tokenizer):
    path = write_pairs(tmp_path / "pairs.jsonl", ROWS)
    here = stream_of(config_for(tmp_path, path), tokenizer)
    copy = tmp_path / "copy.jsonl"
    shutil.copy(path, copy)
    os.utime(copy, (1, 1))
    assert stream_of(config_for(tmp_path, copy), tokenizer).content == here.content
    shorter = config_for(tmp_path, path, data={"max_length": 32})
    assert stream_of(shorter, tokenizer).content != here.content
    path.write_text(path.read_text().replace("good", "fine"))  # of the same length
    other = stream_of(config_for(tmp_path, path), tokenizer)
    assert other.content != here.content
    assert taken(other, 0, ROWS) != taken(stream_of(config_for(tmp_path, copy), tokenizer), 0, ROWS)


def test_a_large_file_is_known_by_its_size_and_samples(tmp_path):
    """What lies between the samples changes nothing, as documented; what lies in them does."""
    path, size = tmp_path / "large", 4 * SAMPLES * SAMPLE_BYTES
    content = bytearray(size)

    def hashed(*places: int, more: bytes = b"") -> str:
        changed = bytearray(content)
        for place in places:
            changed[place] = 1
        path.write_bytes(changed + more)
        return sampled_content([path])

    plain = hashed()
    assert len({plain, hashed(0), hashed(size - 1), hashed(more=b"\0")}) == 4
    assert hashed(SAMPLE_BYTES + 1) == plain


def test_the_next_block_is_made_in_the_background_but_none_that_is_not_needed(tmp_path, tokenizer):
    config = config_for(tmp_path, as_lines(tmp_path)[0])
    stream_of(config, tokenizer, end=PASS).take(0, 1)
    folder = next(Path(config.data.cache_dir).glob("stream-*"))
    deadline = time.monotonic() + patient(20)
    while not (folder / "block-00000001.json").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    shutil.rmtree(config.data.cache_dir)
    stream = stream_of(config, tokenizer, end=BLOCK)
    stream.take(0, BLOCK)
    stream._background.shutdown(wait=True)
    assert not list(folder.glob("block-00000001*"))


REFUSED = [
    ({"train": {"max_steps": None}}, r"train\.max_steps: set it"),
    ({"data": {"order": "easy_to_hard"}}, r"data\.order: easy_to_hard sorts the whole set"),
    (
        {"objective": {"loss_type": "madpo", "tau": "quantile:0.5"}},
        r"objective\.tau: a quantile is",
    ),
    ({"data": {"dataset_num_proc": 2}}, r"data\.dataset_num_proc: a stream tokenises"),
    ({"data": {"dataset_name": None, "datasets": [{"path": "a"}]}}, r"data\.streaming: of one data set only"),
]


@pytest.mark.parametrize("sections, message", REFUSED, ids=[message[:20] for _, message in REFUSED])
def test_what_needs_the_whole_set_is_refused(tmp_path, sections, message):
    with pytest.raises(ValueError, match=message):
        config_for(tmp_path, tmp_path / "pairs.jsonl", **sections)


def test_stages_that_need_the_whole_set_refuse_a_stream(tmp_path):
    config = config_for(tmp_path, tmp_path / "pairs.jsonl", objective={"loss_type": "bradley_terry"})
    for stage in (run_annotation, run_probe):
        with pytest.raises(ValueError, match=r"data\.streaming: .*set data\.streaming=false"):
            stage(config)


@pytest.fixture
def run(tmp_path, tokenizer_folder) -> Config:
    """7 steps of 8 groups of 23 rows in blocks of 5: two and a half epochs, held-out rows read whole."""
    model = save_model(tmp_path / "start", tokenizer_folder, seed=1)
    path, _ = as_lines(tmp_path)
    write_pairs(path / "test.jsonl", 5, seed=9)
    return config_for(
        tmp_path,
        path,
        model={"model_name_or_path": str(model)},
        data={"dataset_test_split": "test"},
        optim={"lr": 3e-3},
        train={"eval_steps": 4, "save_steps": 1, "save_total_limit": 9},
    )


def changed(config: Config, **sections: Any) -> Config:
    tree = config.model_dump(by_alias=True)
    for section, values in sections.items():
        keep = isinstance(values, dict) and section != "objective"
        tree[section] = {**tree[section], **values} if keep else values
    return Config.model_validate(tree)


def train(shard, config: Config) -> None:
    run_training(config, "madpo train test.yaml")


def results(config: Config) -> tuple[list[dict[str, Any]], bytes]:
    """The metrics without the clock, and the exported weights."""
    folder = Path(config.output_dir)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [without_clock(line) for line in lines], (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.ranks
@pytest.mark.parametrize("loss_type, steps", [("dpo", (1, 5)), ("kto", (2,))], ids=["dpo", "kto"])
def test_resume_is_bitwise_the_run_that_was_not_cut_off(run, tmp_path, loss_type, steps):
    """Cut off after step 1 (inside the second block), and with an emptied cache after 2, and after 5 (at the
    end of a block of the second epoch)."""
    whole = changed(run, output_dir=str(tmp_path / "whole"), objective={"loss_type": loss_type})
    run_ranks(2, train, whole)
    want = results(whole)
    assert [line["epoch"] for line in want[0] if "loss" in line] == [0, 0, 1, 1, 1, 2, 2]
    for step in steps:
        cut = cut_off(whole, tmp_path / f"cut{step}", step)
        if step != 1:
            shutil.rmtree(cut.data.cache_dir)
        run_ranks(2, train, cut)
        assert results(cut) == want
    report = json.loads((Path(whole.output_dir) / "data_report.json").read_text())
    assert report["train"]["rows"] == report["train"]["groups"] == ROWS and report["test"]["rows"] == 5


@pytest.mark.ranks
def test_steps_are_the_same_for_any_number_of_ranks(run, tmp_path):
    runs = []
    for ranks in (1, 2):
        one = changed(
            run, output_dir=str(tmp_path / f"ranks{ranks}"), train={"save_steps": None, "max_steps": 4}
        )
        one = changed(one, data={"cache_dir": str(tmp_path / f"cache{ranks}")})
        run_ranks(ranks, train, one)
        runs.append(results(one)[0])
    for alone, together in zip(*runs, strict=True):
        assert together == pytest.approx(alone, rel=2e-4, abs=1e-5)


@pytest.mark.ranks
def test_a_stream_of_one_block_trains_to_the_same_bits_as_the_ordinary_run(run, tmp_path):
    both = []
    for streaming in (False, True):
        data = {"streaming": streaming, "stream_block": ROWS}
        four = {"save_steps": None, "max_steps": 4}
        one = changed(run, output_dir=str(tmp_path / f"{streaming}"), data=data, train=four)
        run_ranks(2, train, one)
        both.append(results(one)[1])
    assert both[0] == both[1]


@pytest.mark.ranks
def test_another_block_size_or_other_rows_are_another_run(run, tmp_path):
    run = changed(run, train={"max_steps": 1, "export": False})
    run_ranks(1, train, run)
    with pytest.raises(AssertionError, match=r"data\.stream_block: 5 there, 6 now"):
        run_ranks(1, train, changed(run, data={"stream_block": 6}))
    write_pairs(tmp_path / "set" / "train.jsonl", ROWS, seed=5)
    with pytest.raises(AssertionError, match=r"data \(content\): 'stream "):
        run_ranks(1, train, run)


@pytest.mark.ranks
def test_a_bad_row_in_a_later_block_leaves_the_checkpoint_before_it(run, tmp_path):
    spoil(tmp_path / "set" / "train.jsonl", 22)
    with pytest.raises(AssertionError, match=r"train\.jsonl:22: chosen: expected text"):
        run_ranks(2, train, run)
    saved = checkpoints_in(Path(run.output_dir) / "checkpoints")
    assert saved[0].name == "step-00000002"
    write_pairs(tmp_path / "set" / "train.jsonl", ROWS)
    with pytest.raises(AssertionError, match=r"data \(content\)"):
        run_ranks(2, train, run)


def test_examples_are_compared_with_those_of_all_blocks_before(tmp_path, tokenizer):
    """Also by a run that goes on, whose earlier blocks another one has read."""
    path = write_pairs(tmp_path / "pairs.jsonl", ROWS)
    lines = path.read_text().splitlines()
    first, second = map(json.loads, lines[:2])
    opposite = {**second, "chosen": second["rejected"], "rejected": second["chosen"]}
    path.write_text("\n".join([*lines, json.dumps(first), json.dumps(opposite)]) + "\n")
    config = config_for(tmp_path, path)
    found = []
    for consumed in (0, BLOCK, 0):  # the first one stops there, and another one reads the rest
        stream = stream_of(config, tokenizer)
        stream.take(consumed, BLOCK if not found else ROWS + 2 - consumed)
        report = stream.report()["train"]
        found.append((report["rows"], report["repeated_examples"], report["contradicting_examples"]))
    assert found[0][1:] == (0, 0) and found[1] == found[2] == (ROWS + 2, 1, 1)
    assert report["where"]["repeated_examples"] == [f"{path}:{ROWS + 1}"]
