"""Exported folders: shards, adapters and merged weights, loaded by others and by the next stage; the card."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from harness import run_ranks
from lora_cases import STAGE_2, adapter_config, changed, stored_adapter, train
from plain import padded_logps
from safetensors.torch import load_file

from madpo.trainer.config.schema import Config
from madpo.trainer.data.training_data import load_data
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.stages.annotate import run_annotation
from madpo.trainer.stages.evaluate import run_evaluation
from madpo.trainer.stages.export import run_export

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer_folder) -> Config:
    """A finished run that exported its adapter and merged weights; not to be written into."""
    folder = tmp_path_factory.mktemp("export")
    run = adapter_config(folder, tokenizer_folder, pairs=21, optim={"lr": 1e-2})
    run = changed(run, train={"export_merged": True})
    run_ranks(2, train, run)
    return run


@pytest.fixture
def config(trained, tmp_path) -> Config:
    """A run of the same models and data, with nothing in its folder."""
    return changed(trained, output_dir=str(tmp_path / "run"), train={"export_merged": False})


def base_of(config: Config) -> Path:
    return Path(str(config.model.model_name_or_path))


def logged(config: Config, name: str) -> float:
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])[name]


@torch.no_grad()
def logps(model: Any, config: Config) -> torch.Tensor:
    """(groups, 2) of the held-out completions, through transformers."""
    held_out = load_data(config, load_tokenizer(config.model), training=False).held_out
    assert held_out is not None
    return padded_logps(model, [held_out[i] for i in range(len(held_out))]).view(-1, 2)


def causal(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


KINDS = {
    "lora": {},
    "rslora": {"peft": {"use_rslora": True}},
    "dora": {"peft": {"use_dora": True}, "deepspeed": STAGE_2},
    "embeddings-and-head": {"peft": {"lora_modules_to_save": ["embed_tokens", "lm_head"]}},
}


@pytest.mark.parametrize("sections", KINDS.values(), ids=KINDS)
def test_adapter_and_merged_weights_score_like_the_run(config, trained, sections):
    run = trained
    if sections:
        run = changed(config, train={"export_merged": True}, **sections)
        run_ranks(2, train, run)
    folder = Path(run.output_dir)
    adapted: Any = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "model")
    assert isinstance(adapted, peft.PeftModel)
    whole = causal(folder / "merged")
    ours, merged, start = (logps(model, run) for model in (adapted, whole, causal(base_of(config))))
    assert ours[:, 0].mean().item() == pytest.approx(logged(run, "eval_logps/chosen"), rel=1e-6)
    torch.testing.assert_close(merged, ours, rtol=1e-5, atol=1e-5)
    assert (merged - start).abs().max() > 0.5, "the run must move for this to prove anything"
    assert type(whole.lm_head) is torch.nn.Linear and not hasattr(whole, "peft_config")
    # What is merged by peft itself.
    for name, value in adapted.merge_and_unload().state_dict().items():
        torch.testing.assert_close(whole.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_an_adapter_folder_has_the_names_that_others_read(trained):
    folder = Path(trained.output_dir) / "model"
    names = load_file(folder / "adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert len(names) == 2 * 7 * 2
    description = json.loads((folder / "adapter_config.json").read_text())
    assert description["base_model_name_or_path"] == str(base_of(trained))
    assert description["inference_mode"] and description["r"] == 4 and description["task_type"] == "CAUSAL_LM"
    assert sorted(path.suffix for path in folder.iterdir()).count(".safetensors") == 1


def merge_later(shard, config: Config) -> None:
    run_export(changed(config, train={"export_merged": True}))
    run_evaluation(config)


def test_merging_later_gives_the_same_files(config, trained):
    """What `madpo export --merge` runs, from the checkpoint."""
    folder = Path(config.output_dir)
    shutil.copytree(trained.output_dir, folder)
    files = [folder / "model" / "adapter_model.safetensors", folder / "merged" / "model.safetensors"]
    before = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    run_ranks(2, merge_later, config)
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize("name", ["model", "merged"])
def test_the_next_stage_starts_from_either_folder(config, trained, tmp_path, name):
    exported = Path(trained.output_dir) / name
    following = changed(
        config,
        output_dir=str(tmp_path / "next"),
        model={"model_name_or_path": str(exported)},
        peft=None if name == "model" else {},
        train={"max_steps": 1},
    )
    run_ranks(2, evaluate_base, following)
    record = json.loads((tmp_path / "next" / "evaluation.json").read_text())
    assert record["eval_logps/chosen"] == pytest.approx(logged(trained, "eval_logps/chosen"), rel=1e-5)
    assert record["eval_rewards/margins"] == 0.0
    run_ranks(2, train, following)
    assert (tmp_path / "next" / "model" / "adapter_config.json").is_file()


def evaluate_base(shard, config: Config) -> None:
    run_evaluation(config, base=True)


def test_a_merge_leaves_the_weights_that_training_goes_on_with(config, tmp_path, tokenizer_folder):
    """The sum of every parameter, the frozen adapter's too, and nothing merged on other ranks."""
    adapter = stored_adapter(tmp_path / "adapter", base_of(config), tokenizer_folder)
    stored = changed(config, model={"model_name_or_path": str(adapter)}, peft=None)
    before, after = run_ranks(2, sums_around_a_merge, stored)[0]
    assert before == after


def sums_around_a_merge(shard, config: Config) -> list[dict[str, float]]:
    from madpo.trainer.model.weights import Entry, gather, whole_weights
    from madpo.trainer.stages.start_engine import start_engine

    engine = start_engine(config, load_tokenizer(config.model), training=True)
    policy = engine.module.policy

    def sums() -> dict[str, float]:
        entries = [Entry(name, [p], p.clone) for name, p in policy.named_parameters()]
        return {name: value.double().sum().item() for name, value in gather(entries, shard).items()}

    out = [sums()]
    merged = gather(whole_weights(policy), shard)
    assert bool(merged) == shard.is_main
    out.append(sums())
    engine.release()
    return out


def test_shards(config):
    """Several files and their index, equal to the one file."""
    run = changed(config, peft=None, train={"max_steps": 2})
    run_ranks(2, train, run)
    folder = Path(run.output_dir)
    whole = load_file(folder / "model" / "model.safetensors")
    run_ranks(2, export_in_shards, run)
    index = json.loads((folder / "model" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert not (folder / "model" / "model.safetensors").exists()
    loaded = causal(folder / "model").state_dict()
    assert whole.keys() <= loaded.keys()
    assert all(torch.equal(loaded[name], value) for name, value in whole.items())


def export_in_shards(shard, config: Config) -> None:
    run_export(changed(config, train={"max_shard_size": "50KB"}))


def test_the_card(trained):
    folder = Path(trained.output_dir)
    for name, library in (("model", "peft"), ("merged", "transformers")):
        _, front, text = (folder / name / "README.md").read_text().split("---\n", 2)
        facts = yaml.safe_load(front)
        assert facts["library_name"] == library and facts["tags"] == ["madpo", "dpo", "lora"]
        # Paths of this machine are no names on the hub.
        assert "base_model" not in facts and "datasets" not in facts and "license" not in facts
        for part in ("AutoPeftModelFor" if library == "peft" else "AutoModelFor", "`dpo` (beta 0.1)"):
            assert part in text
        assert "| train | 21 | 21 |" in text and "| rewards/accuracies | " in text
        assert "`madpo train test.yaml`" in text and "4,096 of " in text and "2 x cpu" in text
        assert f"torch {torch.__version__}" in text
        base = f"Its base model is not on the hub but in the folder `{base_of(trained)}`."
        assert (base in text) is (library == "peft")
        (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        names: dict[str, Any] = {}
        exec(compile(code, "README.md", "exec"), names)
        assert names["folder"] == str(folder / name) and len(names["output"][0]) > len(names["prompt"][0])


def test_everyone_may_read_what_the_umask_lets_them(trained):
    for name in ("model", "merged"):
        files = [path for path in (Path(trained.output_dir) / name).rglob("*") if path.is_file()]
        assert {"README.md"} < {path.name for path in files}
        assert len({path.stat().st_mode for path in files}) == 1


def test_a_reward_model_as_an_adapter(config, tmp_path, tokenizer_folder):
    """Its score layer is in the adapter; annotation and evaluation read it, from checkpoint and folder."""
    from transformers import AutoModelForSequenceClassification

    run = changed(config, objective={"loss_type": "bradley_terry"}, train={"export_merged": True})
    run_ranks(2, train_and_annotate, run)
    folder = Path(run.output_dir)
    tokenizer: Any = load_tokenizer(changed(run, model={"model_name_or_path": str(folder / "model")}).model)
    options: Any = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
    adapted: Any = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder / "model", **options)
    merged: Any = AutoModelForSequenceClassification.from_pretrained(folder / "merged")
    rows = [json.loads(line) for line in (folder / "annotated" / "test.jsonl").read_text().splitlines()]
    for row in rows[:4]:
        ids = torch.tensor([tokenizer(row["prompt"] + row["chosen"])["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            scores = [model(input_ids=ids).logits.item() for model in (adapted, merged)]
        assert scores == pytest.approx([row["score_chosen"]] * 2, rel=1e-4, abs=1e-5)

    other = changed(
        run,
        output_dir=str(tmp_path / "other"),
        model={"model_name_or_path": str(folder / "model")},
        peft=None,
        train={"export_merged": False},
    )
    run_ranks(2, annotate, other)
    assert (tmp_path / "other" / "annotated" / "test.jsonl").read_bytes() == (
        folder / "annotated" / "test.jsonl"
    ).read_bytes()

    language = stored_adapter(tmp_path / "adapter", base_of(config), tokenizer_folder)
    with pytest.raises(AssertionError, match="is no reward model's adapter; merge it first"):
        run_ranks(2, annotate, changed(other, model={"model_name_or_path": str(language)}))


def train_and_annotate(shard, config: Config) -> None:
    train(shard, config)
    run_annotation(config)


def annotate(shard, config: Config) -> None:
    run_annotation(config)


def test_only_an_adapter_can_be_merged(config):
    with pytest.raises(AssertionError, match=r"train\.export_merged: the model has no adapter"):
        run_ranks(1, train, changed(config, peft=None, train={"export_merged": True}))
