"""The head's benchmark: what it measures by default, and its own command line."""

import sys

import pytest
import torch

from madpo.benchmarks.head import run as head
from madpo.benchmarks.head.peers import PEERS
from madpo.benchmarks.head.problems import SHAPES

GPU = torch.device("cuda")
NAMES = [peer.name for peer in head.HEADS]


def on_a_gpu(shapes=(), rows=(), **options) -> head.Settings:
    return head.make_settings(shapes, rows, (), "bfloat16", None, device=GPU, **options)


def test_the_default_fits_ten_minutes_and_says_what_it_leaves_out():
    what = on_a_gpu()
    assert head.minutes(what, NAMES) < 10
    assert set(what.left_out) == {
        "Qwen3-8B",
        "Gemma-3-1B",
        "512 rows",
        "2048 rows",
        "frozen head",
        "saturated",
    }
    left_out, minutes = head.notes(what, {peer.name: "1.0" for peer in PEERS}, {})
    assert "Gemma-3-1B" in left_out and "--all" in left_out
    assert minutes == "about 7 minutes on an H200, by the FLOPs of the shapes"


def test_all_is_every_shape_and_size_and_longer_than_a_sitting():
    what = on_a_gpu(everything=True)
    assert what.shapes == SHAPES and what.rows == head.ROWS and what.variants == head.VARIANTS
    assert not what.left_out and what.logits
    assert head.minutes(what, NAMES) > 30


def test_a_shape_that_is_named_comes_with_its_variants():
    what = on_a_gpu(["Qwen3-8B"], [512])
    assert [shape.name for shape in what.shapes] == ["Qwen3-8B"] and what.rows == (512,)
    assert what.variants == head.VARIANTS and not what.left_out
    without = on_a_gpu(["Qwen3-8B"], [512], variants=False)
    assert not without.variants and not without.logits


def test_on_a_cpu_nothing_is_left_out():
    what = head.make_settings((), (), (), "float32", None, device=torch.device("cpu"))
    assert what.variants == head.VARIANTS and not what.left_out and max(what.rows) == 512
    assert list(head.notes(what, {}, {"TRL": "not here"})) == ["without TRL: not here"]


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [("--shape", "GPT-5", "Llama-3.1-8B"), ("--head", "Axolotl", "Liger"), ("--dtype", "fp8", "bfloat16")],
)
def test_an_unknown_name_is_one_line_of_its_own_command_too(option, value, named, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["head.py", option, value])
    assert head.main() == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {option} {value}") and named in shown and shown.count("\n") == 1
