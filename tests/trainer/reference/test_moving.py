"""TR-DPO's reference, which follows the policy."""

from __future__ import annotations

import pytest
import torch
from harness import run_ranks
from small_runs import changed

from madpo.trainer import loop
from madpo.trainer.config.schema import Config
from madpo.trainer.data.training_data import load_data
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.reference.moving import rounded
from madpo.trainer.stages.start_engine import start_engine
from madpo.trainer.state import TrainState


def test_a_moving_reference_follows_the_policy(config, tmp_path):
    """By hand from the weights of the steps: moves at 2 and 4, of a reference that begins as the policy."""
    moving = changed(
        config,
        model={"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25},
        train={"max_steps": 5, "eval_steps": None, "export": False},
    )
    weights = run_ranks(2, weights_by_step, moving)[0]
    for name, want in weights[0]["reference"].items():
        assert torch.equal(want, weights[0]["start"][name])
        for step, now in enumerate(weights, start=1):
            if step in (2, 4):
                want = torch.lerp(want, now["policy"][name], 0.25)
            torch.testing.assert_close(now["reference"][name], want)
    assert not torch.equal(weights[4]["reference"]["lm_head.weight"], weights[0]["start"]["lm_head.weight"])


def test_a_narrow_reference_moves_by_less_than_its_last_place():
    """In bfloat16 plain rounding moves a weight all the way or not at all; here the mean moves right."""
    theirs = torch.full((40_000,), -1.0, dtype=torch.bfloat16)
    ours = torch.full_like(theirs, -1.0078125)  # the next number
    mixed = torch.lerp(theirs.float(), ours.float(), 0.25)
    got = rounded(mixed, torch.Generator().manual_seed(3))
    assert set(got.tolist()) == {-1.0, -1.0078125}
    assert (got == ours).double().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(got, rounded(mixed, torch.Generator().manual_seed(3)))
    exact = torch.randn(100).bfloat16()
    assert torch.equal(rounded(exact.float(), torch.Generator()), exact)


def weights_by_step(shard, config: Config) -> list[dict[str, dict[str, torch.Tensor]]]:
    """Full weights of policy and reference after every step."""
    import deepspeed

    def weights(model) -> dict[str, torch.Tensor]:
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return {name: p.detach().clone() for name, p in model.named_parameters()}

    tokenizer = load_tokenizer(config.model)
    source = load_data(config, tokenizer, training=True).source
    assert source is not None
    engine = start_engine(config, tokenizer, training=True)
    start, out = weights(engine.module.policy), []

    def keep(record) -> None:
        models = {"policy": engine.module.policy, "reference": engine.module.reference}
        out.append({"start": start, **{name: weights(model) for name, model in models.items()}})

    loop.train(config, engine, source, None, shard, TrainState(), loop.Unsaved(), keep)
    engine.release()
    return out
