"""A reference that is scored once, before training, against one that is scored beside the policy."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import make_config, run_ranks, save_model, without_clock, write_pairs
from kernel_cases import relative_error
from lora_cases import STAGE_2, changed, stored_adapter, train
from plain import zero3_steps

from madpo.trainer.checkpoints.identity import identity
from madpo.trainer.config.schema import Config
from madpo.trainer.data.groups import with_logps
from madpo.trainer.data.order import permutation
from madpo.trainer.data.training_data import load_data
from madpo.trainer.dist import Shard
from madpo.trainer.model.freeze import count_parameters
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.reference import cached as reference
from madpo.trainer.reference import file as reference_file
from madpo.trainer.stages.evaluate import run_evaluation
from madpo.trainer.stages.start_engine import start_engine

pytestmark = pytest.mark.ranks


@pytest.fixture
def config(tmp_path, tokenizer_folder) -> Config:
    model = save_model(tmp_path / "start", tokenizer_folder, seed=1)
    save_model(tmp_path / "other", tokenizer_folder, seed=2)
    write_pairs(tmp_path / "pairs" / "train.jsonl", 21)
    write_pairs(tmp_path / "pairs" / "test.jsonl", 5, seed=9)
    return make_config(
        tmp_path,
        {
            "model": {"model_name_or_path": str(model), "reference": "cached"},
            "data": {"dataset_name": str(tmp_path / "pairs"), "dataset_test_split": "test"},
            "optim": {"lr": 3e-3},
            "train": {"global_batch_size": 7, "num_train_epochs": 2},
        },
    )


def files_of(config: Config) -> list[Path]:
    return sorted(Path(config.data.cache_dir).glob("reference-*"))


def numbers_in(config: Config) -> dict[int, np.ndarray]:
    """The log-probs in the cache, by their number: of train and of test there are differently many."""
    found = [np.array(reference_file.safe_open(x, "np").get_tensor("token_logps")) for x in files_of(config)]
    return {len(logps): logps for logps in found}


def both_ways(shard, cached: Config, joint: Config, steps: int) -> Any:
    return zero3_steps(shard, cached, steps), zero3_steps(shard, joint, steps)


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "fused": (2, {"objective": {"loss_type": "dpo"}}),
    "one-rank": (1, {"objective": {"loss_type": "madpo", "tau": 2.0}}),
    "tokens": (2, {"objective": {"loss_type": "ld_dpo"}}),
    "distributions-of-the-policy": (2, {"objective": {"loss_type": "wpo"}}),
    "mismatched-and-whole-batch": (2, {"objective": {"loss_type": "kto"}}),
    "adapter": (2, {"peft": {"lora_r": 4, "lora_alpha": 8}}),
    "in-slices": (2, {"train": {"sequence_parallel_size": 2}}),
    "prompts-not-shared": (1, {"model": {"prefix_sharing": False}}),
    "adapter-stage-2": (2, {"peft": {"lora_r": 4, "lora_alpha": 8}, "deepspeed": STAGE_2}),
}


@pytest.mark.parametrize("ranks, sections", CASES.values(), ids=CASES)
def test_losses_and_gradients_are_those_of_a_reference_beside_the_policy(config, ranks, sections):
    """In the second step the policy has left the reference behind."""
    cached = changed(config, **sections)
    steps = run_ranks(ranks, both_ways, cached, changed(cached, model={"reference": "auto"}), 2)[0]
    for (loss, gradients), (loss_joint, gradients_joint) in zip(*steps, strict=True):
        assert loss == pytest.approx(loss_joint, rel=1e-6, abs=1e-7)
        assert gradients.keys() == gradients_joint.keys() and gradients
        for name, gradient in gradients.items():
            assert relative_error(gradient, gradients_joint[name]) < 1e-5, name
    assert steps[0][0][0] != steps[0][1][0]


def test_a_named_reference_and_a_stored_adapter(config, tmp_path, tokenizer_folder):
    """A model of another seed, and the frozen copy of an adapter that is trained on."""
    named = changed(config, model={"ref_model_name_or_path": str(tmp_path / "other")})
    adapter = stored_adapter(tmp_path / "adapter", tmp_path / "start", tokenizer_folder)
    continued = changed(config, model={"model_name_or_path": str(adapter)})
    for cached in (named, continued):
        steps = run_ranks(1, both_ways, cached, changed(cached, model={"reference": "auto"}), 2)[0]
        for (loss, gradients), (loss_joint, gradients_joint) in zip(*steps, strict=True):
            assert loss == pytest.approx(loss_joint, rel=1e-6)
            for name, gradient in gradients.items():
                assert relative_error(gradient, gradients_joint[name]) < 1e-5, name


def test_a_copy_beside_an_adapter_is_the_policy_without_it(config):
    adapted = changed(config, peft={"lora_r": 4, "lora_alpha": 8}, model={"reference": "adapter"})
    steps = run_ranks(1, both_ways, adapted, changed(adapted, model={"reference": "joint"}), 2)[0]
    for (loss, gradients), (loss_joint, gradients_joint) in zip(*steps, strict=True):
        assert loss == pytest.approx(loss_joint, rel=1e-6)
        for name, gradient in gradients.items():
            assert relative_error(gradient, gradients_joint[name]) < 1e-5, name


def records(config: Config) -> list[dict[str, float]]:
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [without_clock(json.loads(line)) for line in lines]


def train_and_evaluate(shard, *configs: Config) -> None:
    for config in configs:
        train(shard, config)
        run_evaluation(config)


def test_whole_runs_log_the_same_and_say_what_the_reference_costs(config, tmp_path, capfd):
    joint = changed(config, output_dir=str(tmp_path / "joint"), model={"reference": "joint"})
    again = changed(config, output_dir=str(tmp_path / "again"))
    run_ranks(2, train_and_evaluate, config, joint, again)
    said = capfd.readouterr().out
    assert len(files_of(config)) == 2
    assert f"train.jsonl in {files_of(config)[0].parent}" in said
    assert "scored in" in said and "a sample scored again" in said
    assert "reference: joint, a frozen model of 38,496 parameters beside the policy" in said.replace("\n", "")
    assert "model.reference=cached would compute it once for every completion, not 2 times" in said
    assert records(config) == records(again)  # from the file that was there: bit for bit
    got, want = records(config), records(joint)
    assert len(got) == len(want) == 7 and "eval_loss" in got[-1] and got[0].keys() == want[0].keys()
    for one, two in zip(got, want, strict=True):
        for name in two:
            assert one[name] == pytest.approx(two[name], rel=1e-5, abs=1e-6), name
    evaluations = (json.loads((Path(c.output_dir) / "evaluation.json").read_text()) for c in (config, joint))
    cached, beside = (without_clock({k: v for k, v in e.items() if k != "model"}) for e in evaluations)
    assert cached == pytest.approx(beside, rel=1e-5, abs=1e-6)
    assert cached["eval_loss"] == got[-1]["eval_loss"]


def score(shard: Shard, config: Config) -> list[str]:
    tokenizer = load_tokenizer(config.model)
    _, cached = reference.with_reference(config, load_data(config, tokenizer, True), tokenizer, shard, True)
    assert cached is not None
    return cached.notes


def test_what_is_written_depends_on_ranks_and_budget_by_rounding_only(config, tmp_path):
    other = changed(config, data={"cache_dir": str(tmp_path / "other-cache")})
    run_ranks(2, score, config)
    run_ranks(1, score, changed(other, train={"micro_batch_tokens": 128}))
    assert [path.name for path in files_of(config)] == [path.name for path in files_of(other)]
    one, two = numbers_in(config), numbers_in(other)
    assert one.keys() == two.keys() and len(one) == 2
    for count, logps in one.items():
        assert logps.dtype == np.float32 and np.abs(logps - two[count]).max() < 2e-5


def test_narrow_weights_are_scored_again_within_their_rounding(config):
    """Also where every rank holds them whole."""
    narrow = changed(config, train={"bf16": True}, deepspeed=STAGE_2)
    for again in (False, True):
        notes = run_ranks(2, score, changed(narrow, train={"micro_batch_tokens": 512 if again else 128}))[0]
        assert all(("scored again" in note) is again for note in notes)


def tamper(config: Config, count: int, place: int, by: float) -> Path:
    """Another number in the file of `count` log-probs, with a header that fits it."""
    for path in files_of(config):
        with reference_file.safe_open(path, "np") as file:
            parts, logps = json.loads(file.metadata()["parts"]), np.array(file.get_tensor("token_logps"))
        if len(logps) == count:
            logps[place] += by
            reference_file.write(path, logps, parts)
            return path
    raise AssertionError(f"no file of {count}")


def test_a_sample_is_scored_again_at_every_start(config):
    run_ranks(1, score, config)
    groups = load_data(config, load_tokenizer(config.model), training=True).train
    assert groups is not None
    count, drawn = int(groups.counts.completion_tokens.sum()), int(permutation(21, config.seed, 0)[0])
    place = int(groups.counts.completion_tokens[:drawn].sum())
    path = tamper(config, count, place, by=0.05)
    with pytest.raises(AssertionError, match=r"log-probs are others, by .* delete it"):
        run_ranks(2, score, config)
    before = path.read_bytes()
    with pytest.raises(AssertionError, match="the file was changed, or what computes them"):
        run_ranks(1, train, config)
    assert path.read_bytes() == before, "nothing is recomputed in silence"
    path.unlink()
    assert "scored in" in run_ranks(1, score, config)[0][0]


def start_at(shard: Shard, config: Config, wrong: float) -> None:
    """Begin a run whose cached log-probs are off by `wrong`."""
    tokenizer = load_tokenizer(config.model)
    data = load_data(config, tokenizer, training=True)
    data, cached = reference.with_reference(config, data, tokenizer, shard, training=True)
    assert data.train is not None and data.train.reference is not None and cached is not None
    groups = with_logps(data.train, data.train.reference.flat + np.float32(wrong))
    source = reference.DatasetSource(groups, config.seed, config.data.order, dict)
    engine: Any = start_engine(config, tokenizer, training=True)
    reference.check_policy_fits(config, engine, source, shard, cached, is_fresh=True)
    engine.release()


def test_a_run_from_its_reference_starts_at_a_margin_of_zero(config, tmp_path):
    run_ranks(2, start_at, config, 0.0)
    with pytest.raises(AssertionError, match=r"starts at the reference, but .* by 0\.01 nats a token"):
        run_ranks(2, start_at, config, 0.01)
    named = changed(config, model={"ref_model_name_or_path": str(tmp_path / "other")})
    run_ranks(1, start_at, named, 0.01)  # which starts elsewhere


def keep_no_reference(shard: Shard, config: Config) -> tuple[int, int, int]:
    """The number of the reference's weights that are in memory afterwards; and the trained module's."""
    weights: list[weakref.ref[Any]] = []
    start = reference._start_engine

    def watched(*args: Any) -> Any:
        engine: Any = start(*args)
        parameters = list(engine.module.parameters())
        weights.extend(weakref.ref(p.ds_tensor) for p in parameters)
        return engine

    reference._start_engine = watched
    score(shard, config)
    left = sum(weight() is not None for weight in weights)
    engine: Any = start_engine(config, load_tokenizer(config.model), training=True)
    module = engine.module
    assert module.reference is None and module.reference_scorer is None and module.head.ref_weight is None
    owned = count_parameters(module)[1]
    engine.release()
    return len(weights), left, owned


def test_no_reference_is_in_memory_while_training(config):
    assert run_ranks(1, keep_no_reference, config) == [(21, 0, 38_496)]


def test_a_reference_of_another_vocabulary_is_refused(config, tmp_path, tokenizer_folder):
    wide = save_model(tmp_path / "wide", tokenizer_folder, seed=1, vocab_size=330)
    named = changed(config, model={"ref_model_name_or_path": str(wide)})
    with pytest.raises(AssertionError, match="vocabularies of 311 and 330 tokens"):
        run_ranks(1, train, named)


def test_how_the_reference_is_scored_belongs_to_the_run(config):
    joint = changed(config, model={"reference": "joint"})
    assert identity(config, Shard(0, 1)) != identity(joint, Shard(0, 1))
    with pytest.raises(AssertionError, match="adapter, but the model has none"):
        run_ranks(1, train, changed(config, model={"reference": "adapter"}))


def test_other_folders_with_the_same_model_share_the_file(config, tmp_path):
    run_ranks(1, score, config)
    before = files_of(config)
    shutil.copytree(tmp_path / "start", tmp_path / "moved")
    moved = changed(config, model={"model_name_or_path": str(tmp_path / "moved")})
    assert all("scored again" in note for note in run_ranks(2, score, moved)[0])
    assert files_of(moved) == before
