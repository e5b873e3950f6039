"""Runs that go on with another number of ranks or in another ZeRO stage, and come to equal numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks, save_classifier, save_model
from small_runs import changed, cut_off, evaluate_only, records, tensors_in, train, with_sections

from madpo.trainer.checkpoints.choose import choose
from madpo.trainer.checkpoints.folders import newest_checkpoint
from madpo.trainer.checkpoints.load import load
from madpo.trainer.checkpoints.manifest import read
from madpo.trainer.config.peft import PeftConfig
from madpo.trainer.config.schema import Config
from madpo.trainer.files import Entry, hash_of_file
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.stages.start_engine import start_engine
from madpo.trainer.zero3.shards import Layout

pytestmark = pytest.mark.ranks
FOUR = {"max_steps": 4, "save_steps": 2, "eval_steps": None, "export": False}
STAGE_2: dict[str, Any] = {"zero_optimization": {"stage": 2}}
STAGE_3: dict[str, Any] = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def losses(run: Config) -> list[float]:
    return [line["loss"] for line in records(Path(run.output_dir)) if "loss" in line]


def continued(whole: Config, name: str, ranks: int, **sections: Any) -> list[float]:
    """The losses of a run that was cut off after step 2 and went on so."""
    run = changed(cut_off(whole, Path(whole.output_dir).parent / name, 2), **sections)
    run_ranks(ranks, train, run)
    return losses(run)


def with_peft(config: Config, peft: dict[str, Any] | None = None, **sections: Any) -> Config:
    return Config.model_validate(changed(config, **sections).model_dump(by_alias=True) | {"peft": peft})


KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "adapter": {"peft": PeftConfig(lora_r=2, lora_alpha=4).model_dump()},
    "moving reference": {"model": {"sync_ref_model": True, "ref_model_sync_steps": 1}},
}
OTHERS = {
    "1 rank, stage 2": (1, STAGE_2),
    "3 ranks": (3, STAGE_3),
    "2 ranks, stage 2": (2, STAGE_2),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "full" else [pytest.mark.slow]) for kind in KINDS]
)
def test_other_ranks_and_stages_go_on_with_the_losses_of_the_run_that_was_not_cut_off(config, kind):
    whole = with_peft(config, train=FOUR, **KINDS[kind])
    run_ranks(2, train, whole)
    want = losses(whole)
    assert len(want) == 4
    for name, (ranks, deepspeed) in OTHERS.items():
        assert continued(whole, name, ranks, deepspeed=deepspeed) == pytest.approx(want, rel=0, abs=1e-6), (
            name
        )


def test_a_run_that_began_alone_goes_on_on_several_ranks(config):
    whole = changed(config, train=FOUR, deepspeed={"zero_optimization": {}})
    run_ranks(1, train, whole)
    assert read(checkpoint_of(whole)).zero_stage == 2
    assert continued(whole, "more", 3, deepspeed=STAGE_3) == pytest.approx(losses(whole), rel=0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("bf16", [False, True])
def test_all_stages_in_both_types(config, stage, bf16):
    """In bf16 the gradients are summed in another order on other ranks, as in a run that began there."""
    zero = {"zero_optimization": {"stage": stage}}
    whole = changed(config, train={**FOUR, "bf16": bf16}, deepspeed=zero)
    run_ranks(2, train, whole)
    for other in (1, 2, 3):
        got = continued(whole, f"stage {other}", 2, deepspeed={"zero_optimization": {"stage": other}})
        assert got == pytest.approx(losses(whole), rel=0, abs=2e-3 if bf16 else 1e-6), other
    for ranks in (1, 4):
        got = continued(whole, f"{ranks} ranks", ranks)
        assert got == pytest.approx(losses(whole), rel=0, abs=2e-3 if bf16 else 1e-6), ranks


def checkpoint_of(run: Config) -> Path:
    newest = newest_checkpoint(Path(run.output_dir) / "checkpoints")
    assert newest is not None
    return newest


def saved_again(shard, run: Config, into: str) -> None:
    """Load a checkpoint and save it at once, without a step between."""
    chosen = choose(Path(run.output_dir) / "checkpoints", {}, shard)
    assert chosen is not None
    engine = start_engine(run, load_tokenizer(run.model), training=True)
    state = load(engine, chosen)
    engine.save(Path(into), chosen.folder.name, with_frozen=run.model.sync_ref_model)
    if shard.is_main:
        files = sorted(path.name for path in Path(into).rglob("*.pt"))
        folder = Path(into) / chosen.folder.name
        entries = {name: Entry((folder / name).stat().st_size, hash_of_file(folder / name)) for name in files}
        replace(chosen.manifest, files=entries, world_size=shard.world_size, state=state).write(folder)


@pytest.mark.parametrize(
    "kind",
    [
        *("full", "bf16"),
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in (*KINDS, "tied", "reward")
            if kind != "full"
        ),
    ],
)
def test_back_on_as_many_ranks_the_state_has_the_bits_that_it_had(config, tokenizer_folder, tmp_path, kind):
    """From two ranks to three and back, nothing trained in between."""
    sections = KINDS.get(kind, {})
    if kind == "bf16":
        sections = {"train": {"bf16": True}}
    elif kind == "tied":
        path = save_model(tmp_path / "tied", tokenizer_folder, seed=3, tied=True)
        sections = {"model": {"model_name_or_path": str(path)}}
    elif kind == "reward":
        path = save_classifier(tmp_path / "reward", tokenizer_folder)
        config = with_sections(
            config, {"loss_type": "bradley_terry"}, model={"model_name_or_path": str(path)}
        )
    run = with_peft(config, **{**sections, "train": {**FOUR, "max_steps": 2, **sections.get("train", {})}})
    run_ranks(2, train, run)
    first = checkpoint_of(run)
    for ranks, name in ((3, "three"), (2, "two")):
        root = tmp_path / name / "checkpoints"
        run_ranks(ranks, saved_again, run, str(root))
        run = changed(run, output_dir=str(root.parent))
    names = sorted(path.name for path in first.glob("*.pt"))
    assert names == sorted(path.name for path in checkpoint_of(run).glob("*.pt")) and len(names) == 4
    for name in names:
        before, after = (
            torch.load(folder / name, weights_only=False) for folder in (first, checkpoint_of(run))
        )
        assert len(tensors_in(before)) > 3 or "model_states" in name
        for one, two in zip(tensors_in(before), tensors_in(after), strict=True):
            assert one.dtype == two.dtype and torch.equal(one, two), name


def test_other_ranks_evaluate_and_export_a_run(config, tmp_path):
    run = changed(config, train={**FOUR, "max_steps": 2})
    run_ranks(2, train, run)
    run_ranks(2, evaluate_only, run)
    path = Path(run.output_dir) / "evaluation.json"
    want = path.read_text()
    path.unlink()
    run_ranks(1, evaluate_only, changed(run, deepspeed={"zero_optimization": {}}))
    got, want = json.loads(path.read_text()), json.loads(want)
    assert got.pop("model") == want.pop("model")
    assert got == pytest.approx(want, rel=1e-4, abs=1e-6)


def test_other_trained_parameters_are_refused(config):
    run = changed(config, train={**FOUR, "max_steps": 2})
    run_ranks(2, train, run)
    with pytest.raises(AssertionError, match=r"other parameters are trained than were: .*norm"):
        run_ranks(1, other_parameters, run)


def other_parameters(shard, run: Config) -> None:
    frozen = changed(run, model={"freeze": ["*norm*"]})
    chosen = choose(Path(run.output_dir) / "checkpoints", {}, shard)
    assert chosen is not None
    load(start_engine(frozen, load_tokenizer(run.model), training=True), chosen)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_element_has_one_place(stage, ranks):
    """The pieces of all ranks together are every element of every parameter once, in no one's place."""
    shapes = [
        {"a": torch.Size([3, 5]), "b": torch.Size([7])},
        {"c": torch.Size([1])},
        {"d": torch.Size([64])},
    ]
    totals = [sum(shape.numel() for shape in group.values()) for group in shapes]
    layout = Layout(shapes, ranks, stage, [-(-total // ranks) for total in totals])
    seen, places = dict.fromkeys(layout.sizes, 0), set()
    for rank in range(ranks):
        for name, piece in layout.own(rank):
            assert piece.rank == rank and piece.length > 0
            seen[name] += piece.length
            for index in range(piece.length):
                place = rank, piece.group, piece.offset + index
                assert place not in places
                places.add(place)
    assert seen == layout.sizes == {"a": 15, "b": 7, "c": 1, "d": 64}
    for start, end in ((0, 15), (4, 9), (14, 15)):
        got = [(p.start, p.start + p.length) for p in layout.pieces("a", start, end)]
        assert got[0][0] == start and got[-1][1] == end
        assert all(one[1] == two[0] for one, two in pairwise(got))
