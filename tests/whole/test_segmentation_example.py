"""The segmentation example at a small scale: it learns from preferences, repeats itself and draws."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

PATH = Path(__file__).resolve().parents[2] / "examples" / "segmentation_dpo.py"


@pytest.fixture(scope="module")
def example():
    spec = spec_from_file_location("segmentation_dpo", PATH)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def tiny(example: ModuleType, seed: int = 0):
    return example.Setup(seed, side=16, careless=32, pairs=32, held_out=16, reference_steps=4, steps=4)


@pytest.mark.slow
def test_preferences_alone_improve_the_masks(example, monkeypatch):
    """By 3 standard errors of the paired difference, at least 6 on each of the seeds 0 to 9."""
    forms = {name: example.FORMS[name] for name in ("base", "hinge anchor")}
    monkeypatch.setattr(example, "FORMS", forms)
    setup = example.Setup(side=32, careless=128, held_out=2048, reference_steps=200, steps=150)
    models, pairs, truth = example.experiment(setup)
    before = example.measure(models["reference"], pairs, truth)
    for name in forms:
        after = example.measure(models[name], pairs, truth)
        for metric in ("IoU", "accuracy"):
            gained = after[metric] - before[metric]
            assert gained.mean() > 3 * gained.std() / len(gained) ** 0.5, (name, metric)


def test_a_seed_repeats_itself_and_another_differs(example):
    first, again, other = (example.experiment(tiny(example, seed)) for seed in (0, 0, 1))
    assert first[0].keys() == {"reference", *example.FORMS}
    for name, model in first[0].items():
        measured = example.measure(model, *first[1:])
        repeated = example.measure(again[0][name], *again[1:])
        assert all(torch.equal(values, repeated[metric]) for metric, values in measured.items())
        for ours, same in zip(model.parameters(), again[0][name].parameters(), strict=True):
            assert torch.equal(ours, same)
    assert not torch.equal(first[1].images, other[1].images)


def test_the_table_and_the_picture(example, monkeypatch, tmp_path, capsys):
    experiment, setup = example.experiment, tiny(example)
    monkeypatch.setattr(example, "experiment", lambda _: experiment(setup))
    example.main(tmp_path / "new")
    picture = (tmp_path / "new" / "segmentation_dpo.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and picture.endswith(b"IEND\xaeB`\x82")
    header, *rows, path = capsys.readouterr().out.splitlines()
    assert "boundary IoU" in header and path.endswith("segmentation_dpo.png")
    assert [row[:14].strip() for row in rows] == ["reference", *example.FORMS]


def test_measures_by_hand(example):
    mask, truth = torch.zeros(2, 1, 12, 12, dtype=torch.bool)
    truth[0, 2:10, 2:10] = True  # 64 pixels; all but the inner 4 x 4 are rim
    mask[0, 2:10, 2:6] = True  # its left half, all of it rim
    assert example.iou(mask, truth).item() == 32 / 64
    assert example.rim(truth).sum() == 64 - 16
    overlap = example.iou(example.rim(mask), example.rim(truth))
    torch.testing.assert_close(overlap, torch.tensor([24 / 56]))
    logits = torch.full((1, 12, 12), 2.0)
    right, wrong = torch.sigmoid(torch.tensor([2.0, -2.0])).log()
    expected = (64 * right + 80 * wrong) / 144
    torch.testing.assert_close(example.score(logits, truth), expected[None])
