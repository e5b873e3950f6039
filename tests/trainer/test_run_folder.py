"""metrics.jsonl has one reader, whoever asks: a run that goes on, a report, a model card."""

import json
import re

import pytest
import torch.distributed as torch_dist

from madpo.trainer.dist import Shard
from madpo.trainer.errors import UserError
from madpo.trainer.metrics import MetricsFile
from madpo.trainer.run_folder import claim, last_evaluation, read_metrics

RECORDS = [{"step": 1, "loss": 0.1 + 0.2, "grad_norm": float("inf")}, {"step": 2, "eval_loss": 1e-300}]
LINES = [json.dumps(record) for record in RECORDS]


@pytest.mark.parametrize("end", ["", "\n"], ids=["no-line-feed", "line-feed"])
def test_a_run_goes_on_after_a_last_line_that_is_whole(tmp_path, end):
    """Without its line feed too, so that the next record is not written behind it on the same line."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(LINES) + end)
    assert read_metrics(tmp_path) == RECORDS and last_evaluation(tmp_path) == RECORDS[1]
    file = MetricsFile(tmp_path, resume_step=2)
    file.write({"step": 3})
    file.close()
    assert path.read_text() == "\n".join([*LINES, '{"step": 3}']) + "\n"


@pytest.mark.parametrize("torn", [LINES[1][:-1], LINES[1][:5], "{", '{"step": 2, "name": "\udcc3'])
def test_half_a_last_line_counts_for_nobody(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(f"{LINES[0]}\n{torn}".encode(errors="surrogateescape"))
    assert read_metrics(tmp_path) == RECORDS[:1] and last_evaluation(tmp_path) == {}
    MetricsFile(tmp_path, resume_step=5).close()
    assert path.read_text() == LINES[0] + "\n"


def test_a_broken_line_within_is_named_and_the_file_stays_as_it_is(tmp_path):
    path = tmp_path / "metrics.jsonl"
    content = f"{LINES[0]}\n{LINES[1][:9]}\n{LINES[1]}\n"
    path.write_text(content)
    for read in (read_metrics, last_evaluation, lambda folder: MetricsFile(folder, resume_step=1)):
        with pytest.raises(UserError, match=re.escape(f"{path}:2: ")):
            read(tmp_path)
    assert path.read_text() == content and list(tmp_path.iterdir()) == [path]


def test_no_file_is_no_records(tmp_path):
    assert read_metrics(tmp_path) == [] and last_evaluation(tmp_path) == {}


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    store = f"file://{tmp_path / 'store'}"
    torch_dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        with pytest.raises(UserError) as caught:
            claim(tmp_path / "file" / "run", Shard(0, 1))
    finally:
        torch_dist.destroy_process_group()
    assert str(caught.value) == (
        f"output_dir: {tmp_path / 'file' / 'run'} cannot be written to (Not a directory); name another folder"
    )
