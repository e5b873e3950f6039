"""The schema is strict and its errors say where, what and what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from madpo.trainer.config import strict_yaml
from madpo.trainer.config.effects import sections_in
from madpo.trainer.config.peft import PeftConfig
from madpo.trainer.config.schema import Config, dump, from_tree, load
from madpo.trainer.config.section import Section
from madpo.trainer.engine import deepspeed_config
from madpo.trainer.objectives.registry import OBJECTIVES

MINIMAL = """
output_dir: runs/x
model: {model_name_or_path: some/model}
data: {dataset_name: pairs.jsonl}
objective: {loss_type: madpo}
"""
CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@pytest.fixture
def path(tmp_path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(MINIMAL)
    return file


def test_defaults_and_dotted_overrides(path):
    config = load(path, ["objective.beta=0.05", "optim.lr=2e-6", "train.bf16=false"])
    assert (config.objective.beta, config.optim.lr, config.train.bf16) == (0.05, 2e-6, False)
    assert config.objective.c_min == 0.25
    assert config.train.global_batch_size == 64


@pytest.mark.parametrize("text, value", [("true", True), ("false", False), ("selective", "selective")])
def test_gradient_checkpointing_takes_three_values(path, tmp_path, text, value):
    config = load(path, [f"model.gradient_checkpointing={text}"])
    (tmp_path / "resolved.yaml").write_text(dump(config))
    for one in (config, load(tmp_path / "resolved.yaml")):
        assert one.model.gradient_checkpointing == value and isinstance(
            one.model.gradient_checkpointing, type(value)
        )


def test_an_override_can_replace_a_block(path):
    config = load(path, ["objective={loss_type: dpo, beta: 1e-1}"])
    assert config.objective.model_dump() == {"loss_type": "dpo", "beta": 0.1}


def test_dump_and_load_give_the_same_config(path, tmp_path):
    config = load(path, ["objective.lambda=2", "deepspeed.zero_optimization.stage=2"])
    (tmp_path / "resolved.yaml").write_text(dump(config))
    assert load(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    "file",
    sorted(file for file in CONFIGS.glob("*.yaml") if "stages" not in strict_yaml.read(file)),  # no recipes
    ids=lambda file: file.name,
)
def test_every_shipped_config_resolves(file):
    task = "generate" if file.name == "quickstart_samples.yaml" else "train"
    assert isinstance(load(file, task=task), Config)


ERRORS = [
    (["generate.batch_siz=1"], r"generate\.batch_siz: unknown key, did you mean 'batch_size'\?"),
    (
        ["generate.judge.endpoint.modle=x"],
        r"generate\.judge\.endpoint\.modle: unknown key, did you mean 'model'\?",
    ),
    (["generate.temperature=0"], r"generate: temperature: 0 gives the same completion each time"),
    (["generate.judge={}"], r"generate\.judge: set exactly one of reward_model, function and endpoint"),
    (["generate.judge={reward_model: a, function: 'b:c'}"], r"generate\.judge: set exactly one of"),
    (["generate.judge.function=score"], r"generate\.judge: function: write module:name or .*got 'score'"),
    (["generate.pairs=best_worst"], r"generate: pairs: best_worst needs a judge and at least two"),
    (["generate={partitioned: true, backend: auto}"], r"generate: partitioned: only the backend hf"),
    (
        ["generate.judge.endpoint={url: 'file:///x', model: m}"],
        r"generate\.judge\.endpoint: url: expected http:// or https://, got 'file:///x'",
    ),
    (
        ["generate.judge.endpoint={url: 'http://x', model: m, template: '{prompt}'}"],
        r"generate\.judge\.endpoint: template: a score question must hold \{completion\}",
    ),
    (
        ["generate={num_completions: 1, judge: {endpoint: {url: 'http://x', model: m, mode: pairwise}}}"],
        r"generate: judge\.endpoint\.mode: pairwise needs at least two completions",
    ),
    (["optim.lrr=1"], r"optim\.lrr: unknown key, did you mean 'lr'\?"),
    (["objective.bta=1"], r"objective\.bta: unknown key, did you mean 'beta'\?"),
    (["modle.x=1"], r"modle: unknown key, did you mean 'model'\?"),
    (["optim.lr=-1"], r"optim\.lr: expected a number above 0, got -1$"),
    (["optim.lr=.nan"], r"optim\.lr: expected a number above 0, got nan$"),
    (["objective.loss_type=madop"], r"unknown objective 'madop', did you mean 'madpo'"),
    (["objective={}"], r"objective: loss_type is required; one of alpha_dpo, alphapo, .*, madpo, "),
    (["objective={loss_type: [dpo, [ipo]]}"], r"objective"),
    (["objective={loss_type: [dpo, ip0]}"], r"unknown objective 'ip0'"),
    (["objective={loss_type: [dpo, ipo], loss_weights: [1.0]}"], r"1 for 2 terms"),
    (["objective={loss_type: [dpo, ipo], tau: 1.0}"], r"tau: none of dpo, ipo has this parameter"),
    (
        ["objective.tau=quantile:2"],
        r"objective\.tau: expected a number above 0, or quantile:q .*got 'quantile:2'$",
    ),
    (["objective.c_min=1"], r"objective\.c_min: expected a number above 0 and below 1 or null, got 1$"),
    (
        ["objective={loss_type: dpo, tau: 1}"],
        r"tau: unknown key; dpo has beta; tau is a parameter of .*madpo",
    ),
    (
        ["objective={loss_type: nll, beta: 1}"],
        r"nll has no parameters; beta is .* others \(madpo keys beta\)",
    ),
    (["data={}"], r"data\.dataset_name: is required"),
    (["data=null"], r"data: is required; name the data set in data\.dataset_name$"),
    (
        ["output_dir=null"],
        r"output_dir: is required; name a folder for the run, as in output_dir=runs/first$",
    ),
    (["peft=true"], r"peft: expected a section or null, got true; peft=\{\} trains an adapter$"),
    (["optim.warmup_steps=3", "optim.warmup_ratio=0.1"], r"warmup_steps or warmup_ratio, not both"),
    (["train.micro_batch_tokens=100"], r"set it to at least 2048$"),
    (["model.model_name_or_path=null"], r"set one of model_name_or_path"),
    (["model={init_config: {model_type: llama}, tokenizer_name_or_path: t}"], r"needs a reference"),
    (["model={init_config: {}, tokenizer_name_or_path: t}"], r"model_type is missing"),
    (
        ["launch.num_processes=0"],
        r"num_processes: expected a whole number of at least 1 or auto, got 0$",
    ),
    (["deepspeed.zero_optimisation.stage=3"], r"unknown key, did you mean 'zero_optimization'\?"),
    (["deepspeed.gradient_clipping=1"], r"madpo sets this itself; use optim\.max_grad_norm"),
    (["optim.lr"], r"write section\.key=value"),
    (["optim.lr=true"], r"optim\.lr: expected a number above 0, got true$"),
    (["train.max_steps='64'"], r"train\.max_steps: expected a whole number of at least 1 or null, got '64'$"),
    (["train.bf16=no"], r"train\.bf16: expected true or false, got 'no'$"),
    (["deepspeed.tensor_parallel.autotp_size=2"], r"madpo sets this itself"),
    (["deepspeed.zero_optimization.stage=0"], r"stage 1, 2 or 3"),
    (
        ["model.gradient_checkpointing=some"],
        r"checkpointing: expected true, false or selective, got 'some'$",
    ),
    (["model.attention=flash", "train.bf16=false"], r"flash computes in bf16"),
    (["train.eval_steps=5", "data.dataset_test_split=null"], r"nothing to evaluate on"),
    (["objective={loss_type: nll}", "model.ref_model_name_or_path=x"], r"nll uses no reference"),
    (["objective={loss_type: nll}", "model.reference=cached"], r"cached, but nll uses no reference"),
    (["model.reference=none"], r"none, but madpo compares with a reference; set auto"),
    (["model.reference=of"], r"model\.reference: expected auto, joint, cached, adapter or none, got 'of'$"),
    (["model={model_name_or_path: m, ref_model_name_or_path: x, reference: adapter}"], r"leave the name out"),
    (["model.reference=cached", "model.sync_ref_model=true"], r"are of a reference that stays"),
    (
        ["model.reference=cached", "data.streaming=true", "train.max_steps=4"],
        r"needs the whole set before training, which a stream never has",
    ),
    (["model.reference=cached", "objective={loss_type: tdpo}"], r"the reference's whole distribution"),
    (["output_dir.x=1"], r"output_dir is a value, not a section; .* as in 'output_dir={\.\.\.}'$"),
    (["optim.lr=[1"], r"override 'optim\.lr=\[1'.* quote it whole, as in 'peft={lora_r: 8}'$"),
]


@pytest.mark.parametrize("overrides, message", ERRORS, ids=[" ".join(o) for o, _ in ERRORS])
def test_errors_name_the_key_and_the_remedy(path, overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(path, overrides)
    assert not re.search("validation error|Input should|Extra inputs", str(caught.value)), "pydantic's words"


def test_all_problems_are_reported_at_once(path):
    with pytest.raises(ValueError, match="3 problems") as caught:
        load(path, ["optim.lr=0", "modle=1", "objective.bta=2"])
    assert all(key in str(caught.value) for key in ("optim.lr", "modle", "objective.bta"))


def test_duplicate_keys_are_refused_with_their_line(tmp_path):
    (tmp_path / "c.yaml").write_text("a: 1\nb:\n  x: 1\n  x: 2\n")
    with pytest.raises(ValueError, match=r"c\.yaml:4: key 'x' stands twice"):
        strict_yaml.read(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-6", 1e-6),
        ("2E+3", 2000.0),
        ("-1e2", -100.0),
        ("1.5e-3", 1.5e-3),
        ("12", 12),
        ("e5", "e5"),
        ("'1e-6'", "1e-6"),
        ("010", 10),
        ("1:30", "1:30"),
        ("no", "no"),
        ("true", True),
        ("", None),
        (".5", 0.5),
    ],
)
def test_floats_are_read_as_people_write_them(text, value):
    got = strict_yaml.parse(text, "test")
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['true']", "a: [", "\tx: 1", "1: 2"])
def test_odd_yaml_is_refused(text):
    with pytest.raises(ValueError, match="test"):
        strict_yaml.parse(text, "test")


def test_deepspeed_block_is_passed_through(path, monkeypatch):
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    config = load(path, ["deepspeed={zero_optimization: {stage3_prefetch_bucket_size: 7}, dump_state: true}"])
    got = deepspeed_config(config)
    assert got["zero_optimization"]["stage"] == 3
    assert got["zero_optimization"]["stage3_prefetch_bucket_size"] == 7
    assert got["dump_state"] is True
    assert got["gradient_clipping"] == config.optim.max_grad_norm
    assert deepspeed_config(load(path))["zero_optimization"]["stage"] == 2


def test_the_names_of_other_libraries(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "output_dir: o\nmodel: {model_name_or_path: m}\ndata: {dataset_name: d.jsonl}\n"
        "objective: {loss_type: sigmoid, beta: 0.2}\n"
    )
    found = load(path)
    assert (found.objective.loss_type, found.objective.beta) == ("dpo", 0.2)


def test_an_objective_stands_in_where_none_is_needed(tmp_path):
    (tmp_path / "config.yaml").write_text(MINIMAL.replace("objective: {loss_type: madpo}\n", ""))
    with pytest.raises(ValueError, match="objective: is required"):
        load(tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml", [], "generate").objective.loss_type == "nll"
    assert (
        load(tmp_path / "config.yaml", ["objective.loss_type=dpo"], "generate").objective.loss_type == "dpo"
    )


def descriptions(section: type[Section], prefix: str = "") -> dict[str, str | None]:
    found = dict[str, str | None]()
    for name, field in section.model_fields.items():
        found[prefix + name] = field.description
        for inner in sections_in(field):
            found |= descriptions(inner, f"{prefix}{name}.")
    return found


def test_every_key_has_a_description_that_reads_alone():
    described = descriptions(Config)
    for entry in OBJECTIVES.values():
        parameters = entry.params.model_fields.items()
        described |= {f"{entry.name}.{name}": x.description for name, x in parameters if name != "loss_type"}
    assert len(described) > 200
    leans = re.compile(r"(?i)(of|as|its|their|it|null|so many|in place)\b")
    assert [name for name, text in described.items() if not text or leans.match(text)] == []


def test_keys_that_decide_an_identity_are_keys():
    """A misspelt name would leave a value out of the identity of what it decides."""
    config = PeftConfig(load_in_4bit=True)
    assert config.only("load_in_4bit", "lora_r") == {"lora_r": None, "load_in_4bit": True}
    with pytest.raises(AssertionError, match="PeftConfig has no lora_rank"):
        config.only("lora_r", "lora_rank")


@pytest.mark.parametrize("folder", ["", "  ", "a\0b"])
def test_a_folder_without_a_name_is_refused(tmp_path, folder):
    tree = {"output_dir": folder, "model": {"model_name_or_path": "m"}, "data": {"dataset_name": "d"}}
    with pytest.raises(ValueError, match=r"output_dir: (names no folder|cannot be looked at)"):
        from_tree({**tree, "objective": {"loss_type": "dpo"}}, "c.yaml")


def test_the_home_folder_is_where_the_shell_finds_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tree = {"output_dir": "~/run", "model": {"model_name_or_path": "m"}, "data": {"dataset_name": "d"}}
    found = from_tree({**tree, "objective": {"loss_type": "dpo"}}, "c.yaml")
    assert found.output_dir == str(tmp_path / "run")
