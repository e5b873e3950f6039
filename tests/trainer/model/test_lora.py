"""LoRA under ZeRO against plain peft and autograd; the policy without its adapter as the reference."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from harness import run_ranks
from kernel_cases import relative_error
from lora_cases import STAGE_2, adapter_config, changed, stored_adapter, train
from plain import padded_logps, plain_optimizer, zero3_steps
from small_runs import cut_off

from madpo.trainer.config.schema import Config
from madpo.trainer.data.order import DataOrder
from madpo.trainer.data.training_data import load_data
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.model.weights import adapter_weights, gather
from madpo.trainer.objectives.base import MarginWeight
from madpo.trainer.stages.evaluate import run_evaluation
from madpo.trainer.stages.start_engine import start_engine

pytestmark = pytest.mark.ranks

BATCH = 7
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def home(tmp_path_factory, tokenizer_folder) -> Config:
    """A run whose models and data all tests read; the base model is in `base`, an adapter in `adapter`."""
    folder = tmp_path_factory.mktemp("lora")
    config = adapter_config(
        folder,
        tokenizer_folder,
        pairs=40,
        objective={"loss_type": "madpo", "tau": 2.0},
        optim={"lr": 3e-3, "weight_decay": 0.01},
        train={"global_batch_size": BATCH},
    )
    stored_adapter(folder / "adapter", folder / "base", tokenizer_folder)
    return config


@pytest.fixture(scope="module")
def base(home) -> Path:
    return Path(str(home.model.model_name_or_path))


@pytest.fixture
def config(home, tmp_path) -> Config:
    return changed(home, output_dir=str(tmp_path / "run"))


@pytest.fixture
def continued(config, base) -> Config:
    """A run that trains a stored adapter on."""
    return changed(config, model={"model_name_or_path": str(base.parent / "adapter")}, peft=None)


@pytest.fixture(scope="module")
def plain(base) -> Callable[[Config], list[Any]]:
    """`plain_steps`, three of them, once for all runs that differ in what changes no number."""
    known: dict[str, list[Any]] = {}

    def steps(config: Config) -> list[Any]:
        key = f"{config.peft} {config.model.model_name_or_path}"
        if key not in known:
            known[key] = plain_steps(config, 3, base)
        return known[key]

    return steps


def start_weights(shard, config: Config) -> dict[str, torch.Tensor]:
    engine: Any = start_engine(config, load_tokenizer(config.model), training=True)
    weights = gather(adapter_weights(engine.module.policy), shard)
    engine.release()
    return weights


def plain_steps(config: Config, steps: int, base: Path) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """peft's own model in ordinary PyTorch; the reference with its own way to switch the adapter off."""
    from transformers import AutoModelForCausalLM

    policy: Any = AutoModelForCausalLM.from_pretrained(base)
    frozen = None
    if config.peft is None:
        folder = str(config.model.model_name_or_path)
        policy = peft.PeftModel.from_pretrained(policy, folder, is_trainable=True)
        frozen = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    else:
        settings = config.peft
        options: Any = {
            "modules_to_save": settings.lora_modules_to_save,
            "use_rslora": settings.use_rslora or False,
            "use_dora": settings.use_dora or False,
            "task_type": "CAUSAL_LM",
        }
        policy = peft.get_peft_model(
            policy, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **options)
        )
        start = run_ranks(1, start_weights, config)[0]
        missing, unexpected = policy.load_state_dict({PREFIX + k: v for k, v in start.items()}, strict=False)
        assert not unexpected and not [name for name in missing if ".default." in name]
    groups = load_data(config, load_tokenizer(config.model), training=True).train
    assert groups is not None
    order, optimizer, out = DataOrder(len(groups), config.seed), plain_optimizer(policy, config), []
    for step in range(steps):
        batch = [groups[index] for index in order.take(step * BATCH, BATCH)]
        logps = padded_logps(policy, batch).view(-1, 2)
        with torch.no_grad():
            if frozen is not None:
                ref_logps = padded_logps(frozen, batch).view(-1, 2)
            else:
                with policy.disable_adapter():
                    ref_logps = padded_logps(policy, batch).view(-1, 2)
        ratios = logps - ref_logps
        margins = torch.tensor([group.edges[0][2] for group in batch])
        weight = MarginWeight(4, 0.25, 1, config.objective.tau)(margins)
        loss = (-F.logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])) * weight).mean()
        optimizer.zero_grad()
        loss.backward()
        trained = {n.removeprefix(PREFIX): p for n, p in policy.named_parameters() if p.requires_grad}
        out.append((loss.item(), {name: p.grad.clone() for name, p in trained.items()}))
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.optim.max_grad_norm)
        optimizer.step()
    return out


def compare(got, want, tolerance=1e-5):
    for step, ((loss, gradients), (true_loss, true_gradients)) in enumerate(zip(got, want, strict=True)):
        assert loss == pytest.approx(true_loss, rel=tolerance), f"loss of step {step}"
        assert gradients.keys() == true_gradients.keys()
        flat = [torch.cat([g[n].flatten() for n in sorted(g)]) for g in (gradients, true_gradients)]
        assert relative_error(*flat) < tolerance, f"gradient of step {step}"


VARIANTS = {
    "zero-3": {},
    "zero-2": {"deepspeed": STAGE_2},
    "checkpointing": {"model": {"gradient_checkpointing": True}},
    "rslora": {"peft": {"use_rslora": True}},
    "dora-zero-2": {"peft": {"use_dora": True}, "deepspeed": STAGE_2},
    "embeddings-and-head": {"peft": {"lora_modules_to_save": ["embed_tokens", "lm_head"]}},
}


@pytest.mark.parametrize("sections", VARIANTS.values(), ids=VARIANTS)
def test_two_ranks_equal_plain_peft(config, plain, sections):
    """Losses and the gradients of all adapter weights, and through them the updates, over three steps."""
    run = changed(config, **sections)
    want = plain(run)
    losses = [loss for loss, _ in want]
    assert max(losses) > 1.01 * min(losses), "the run must move for this to prove anything"
    compare(run_ranks(2, zero3_steps, run, 3)[0], want)


@pytest.mark.parametrize("sections", [{}, {"deepspeed": STAGE_2}], ids=["zero-3", "zero-2"])
def test_a_stored_adapter_is_trained_on_against_a_frozen_copy_of_itself(continued, plain, sections):
    run = changed(continued, **sections)
    compare(run_ranks(2, zero3_steps, run, 3)[0], plain(run))


OBJECTIVES = {
    "madpo": {"loss_type": "madpo", "tau": 2.0},
    "whole-batch": {"loss_type": "beta_dpo"},
    "mismatched": {"loss_type": "kto"},
    "distributions": {"loss_type": "tdpo"},
}


@pytest.mark.parametrize(
    "objective, checkpointing",
    [(objective, name == "madpo") for name, objective in OBJECTIVES.items()],
    ids=OBJECTIVES,
)
def test_the_switched_off_adapter_is_exactly_the_base_model(config, base, objective, checkpointing):
    """Bit for bit the run whose reference is the base model loaded a second time; head and embeddings too."""
    run = changed(
        config,
        objective=objective,
        model={"gradient_checkpointing": checkpointing},
        peft={"lora_modules_to_save": ["embed_tokens", "lm_head"]},
    )
    twice = changed(run, model={"ref_model_name_or_path": str(base)})
    got, want = (run_ranks(2, zero3_steps, one, 2)[0] for one in (run, twice))
    for (loss, gradients), (true_loss, true_gradients) in zip(got, want, strict=True):
        assert loss == true_loss
        assert all(torch.equal(gradients[name], true_gradients[name]) for name in true_gradients)
    assert got[0][0] != got[1][0]


@pytest.mark.parametrize(
    "kind, bf16, checkpointing",
    [("fresh", False, False), ("fresh", True, True), ("whole-layers", True, False), ("stored", True, True)],
)
def test_the_margin_before_the_first_step_is_exactly_zero(config, continued, kind, bf16, checkpointing):
    run = continued if kind == "stored" else config
    if kind == "whole-layers":
        run = changed(config, peft={"lora_modules_to_save": ["embed_tokens", "lm_head"]})
    start = changed(
        run,
        objective={"loss_type": "dpo"},
        model={"gradient_checkpointing": checkpointing},
        train={"bf16": bf16, "max_steps": 1, "export": False},
    )
    run_ranks(2, train, start)
    first = json.loads((Path(start.output_dir) / "metrics.jsonl").read_text().splitlines()[0])
    assert first["rewards/margins"] == 0.0 and first["kl"] == 0.0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["grad_norm"] > 0


def trained_names(shard, config: Config) -> list[list[str]]:
    """Before, in the reference, and after."""
    engine: Any = start_engine(config, load_tokenizer(config.model), training=True)
    module = engine.module

    def names() -> list[str]:
        return [name for name, p in module.named_parameters() if p.requires_grad]

    before = names()
    with module.reference_scorer.state():
        within = names()
    out = [before, within, names()]
    assert module.reference is None and (module.head.ref_weight is module.head.weight)
    engine.release()
    return out


def test_switching_changes_no_requires_grad_and_only_the_policys_adapter_is_trained(config, continued):
    for run in (config, continued):
        before, within, after = run_ranks(2, trained_names, run)[0]
        assert before == within == after
        assert len(before) == 2 * 7 * 2 and all(".lora_" in name and ".default." in name for name in before)


@pytest.mark.parametrize("kind", ["fresh", "stored"])
def test_resume_is_bitwise_the_run_that_was_not_cut_off(config, continued, tmp_path, kind):
    run = changed(config if kind == "fresh" else continued, train={"max_steps": 4, "save_steps": 2})
    whole = changed(run, output_dir=str(tmp_path / "whole"))
    run_ranks(2, train, whole)
    cut = cut_off(whole, tmp_path / "cut", 2)
    run_ranks(2, train, cut)
    got, want = ((Path(one.output_dir) / "model" / "adapter_model.safetensors") for one in (cut, whole))
    assert got.read_bytes() == want.read_bytes()
    # The base model is in no checkpoint: only the adapter's weights are, and their optimiser state.
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt"
    found = torch.load(Path(whole.output_dir) / "checkpoints" / "step-00000002" / name, weights_only=False)
    assert all(".default." in key or not value.numel() for key, value in found["module"].items())


def test_evaluation_of_an_adapter_is_that_of_the_run(config):
    run = changed(config, train={"max_steps": 3, "export": False})
    run_ranks(2, train, run)
    lines = (Path(run.output_dir) / "metrics.jsonl").read_text().splitlines()
    run_ranks(2, evaluate, run)
    record = json.loads((Path(run.output_dir) / "evaluation.json").read_text())
    assert record["model"] == "step-00000003"
    for name in ("eval_loss", "eval_kl", "eval_logps/chosen"):
        assert record[name] == pytest.approx(json.loads(lines[-1])[name], rel=1e-6)
    other = changed(run, peft={"lora_r": 8})
    with pytest.raises(AssertionError, match=r"peft\.lora_r: 4 there, 8 now"):
        run_ranks(2, evaluate, other)


def evaluate(shard, config: Config) -> None:
    run_evaluation(config)
