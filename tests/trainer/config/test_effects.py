"""What each key of the config has an effect on, key by key.

The table says it of every key. Its first column: whether a continuation of a run may have another value
(`free`) or is refused (`fixed`). The second: whether a recipe does a finished stage again that has another
value, or keeps it. The third: whether a recipe takes the value for the name of something that the stage
reads, whose content then counts. `packed`: free, or kept, unless the model's router has a loss of its own,
which is formed of each packed row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from config_keys import OBJECTIVE, dotted, filled, kinds, other
from harness import make_config

from madpo.launch.recipes import keys as recipes_keys
from madpo.launch.recipes import read as recipe
from madpo.launch.recipes.keys import reads
from madpo.trainer.checkpoints.identity import identity
from madpo.trainer.config import effects
from madpo.trainer.config.schema import Config
from madpo.trainer.config.section import Effect
from madpo.trainer.dist import Shard
from madpo.trainer.objectives.registry import OBJECTIVES

TABLE = """
output_dir                              free    kept
seed                                    fixed   again
model.model_name_or_path                fixed   again   path
model.model_revision                    fixed   again
model.init_config                       fixed   again
model.ref_model_name_or_path            fixed   again   path
model.reference                         fixed   again
model.sync_ref_model                    fixed   again
model.ref_model_mixup_alpha             fixed   again
model.ref_model_sync_steps              fixed   again
model.tokenizer_name_or_path            fixed   again   path
model.attention                         free    kept
model.prefix_sharing                    packed  packed
model.gradient_checkpointing            free    kept
model.activation_offloading             free    kept
model.use_liger_kernel                  free    kept
model.router_aux_loss_coef              fixed   again
model.resize_embeddings                 fixed   again
model.freeze                            fixed   again
peft                                    fixed   again
peft.lora_r                             fixed   again
peft.lora_alpha                         fixed   again
peft.lora_dropout                       fixed   again
peft.lora_target_modules                fixed   again
peft.lora_modules_to_save               fixed   again
peft.use_rslora                         fixed   again
peft.use_dora                           fixed   again
peft.base_model_name_or_path            fixed   again   path
peft.load_in_4bit                       fixed   again
peft.load_in_8bit                       fixed   again
peft.bnb_4bit_quant_type                fixed   again
peft.use_bnb_nested_quant               fixed   again
data.dataset_name                       free    again   path
data.datasets                           free    again
data.datasets.path                      free    again   path
data.datasets.name                      free    again
data.datasets.split                     free    again
data.datasets.test_split                free    again
data.datasets.fraction                  free    again
data.datasets.adapter                   free    again
data.datasets.columns                   free    again
data.dataset_config                     fixed   again
data.dataset_train_split                fixed   again
data.dataset_test_split                 free    again
data.adapter                            fixed   again
data.columns                            fixed   again
data.ignore_columns                     fixed   again
data.edges                              fixed   again
data.chat_template_kwargs               fixed   again
data.template_may_drop                  fixed   again
data.template_date                      fixed   again
data.train_on                           fixed   again
data.streaming                          fixed   again
data.stream_block                       fixed   again
data.max_length                         fixed   again
data.append_eos                         fixed   again
data.text_holds_special_tokens          fixed   again
data.merge_prompts                      fixed   again
data.order                              fixed   again
data.min_weight                         fixed   again
data.sampling                           fixed   again
data.folds                              fixed   again
data.fold                               fixed   again
data.on_bad_row                         free    again
data.dataset_num_proc                   free    kept
data.cache_dir                          free    kept
objective                               fixed   again
optim.lr                                fixed   again
optim.weight_decay                      fixed   again
optim.adam_beta1                        fixed   again
optim.adam_beta2                        fixed   again
optim.adam_epsilon                      fixed   again
optim.max_grad_norm                     fixed   again
optim.lr_scheduler_type                 fixed   again
optim.warmup_steps                      fixed   again
optim.warmup_ratio                      fixed   again
train.global_batch_size                 fixed   again
train.micro_batch_tokens                packed  packed
train.sequence_parallel_size            fixed   again
train.num_train_epochs                  fixed   again
train.max_steps                         fixed   again
train.bf16                              fixed   again
train.logging_steps                     free    again
train.eval_on_start                     free    again
train.eval_steps                        free    again
train.save_steps                        free    kept
train.save_total_limit                  free    kept
train.save_permanent_steps              free    kept
train.async_save                        free    kept
train.export                            free    again
train.export_merged                     free    again
train.max_shard_size                    free    again
train.max_skipped_steps                 free    kept
train.head_gib                          free    kept
train.head_impl                         free    kept
train.peak_tflops                       free    again
annotate.folds                          free    again
annotate.models                         free    again   path
launch.num_processes                    free    again
launch.start_timeout_minutes            free    kept
launch.timeout_minutes                  free    kept
generate                                free    again
generate.models                         free    again   path
generate.num_completions                free    again
generate.max_new_tokens                 free    again
generate.temperature                    free    again
generate.top_p                          free    again
generate.top_k                          free    again
generate.prompt_tokens                  free    again
generate.limit                          free    again
generate.batch_size                     free    again
generate.backend                        free    again
generate.partitioned                    free    again
generate.judge                          free    again
generate.judge.reward_model             free    again   path
generate.judge.function                 free    again   function
generate.judge.endpoint                 free    again
generate.judge.endpoint.url             free    again
generate.judge.endpoint.model           free    again
generate.judge.endpoint.api_key_env     free    again
generate.judge.endpoint.mode            free    again
generate.judge.endpoint.template        free    again
generate.judge.endpoint.parameters      free    again
generate.judge.endpoint.timeout         free    again
generate.judge.endpoint.max_retries     free    again
generate.judge.endpoint.retry_wait      free    again
generate.judge.endpoint.concurrency     free    again
generate.pairs                          free    again
deepspeed                               free    again
deepspeed.zero_optimization.stage       free    again
deepspeed.communication_data_type       fixed   again
"""
OF_DEEPSPEED = {
    "deepspeed.zero_optimization.stage": {"zero_optimization": {"stage": 2}},
    "deepspeed.communication_data_type": {"communication_data_type": "bf16"},
}
"""Not of the schema: keys of the block with effects of their own."""

EFFECTS = {line.split()[0]: line.split()[1:] for line in TABLE.split("\n") if line}
ROUTER = {"router_aux_loss_coef": 0.5}


@pytest.fixture
def config(tmp_path) -> Config:
    return filled(
        make_config(tmp_path, {"model": {"model_name_or_path": "m"}, "data": {"dataset_name": "d"}})
    )


def with_router_loss(config: Config) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update=ROUTER)})


def changed(config: Config, key: str) -> Config:
    if key == OBJECTIVE:
        return config.model_copy(update={OBJECTIVE: OBJECTIVES["ipo"].params()})
    if key in OF_DEEPSPEED:
        return config.model_copy(update={"deepspeed": OF_DEEPSPEED[key]})
    return other(config, key)


def found(config: Config, key_of: Callable[[dict[str, Config]], dict[str, Any]], names: list[str]) -> Any:
    """Key -> its effect on what `key_of` finds of configs by name, in models without and with router loss."""
    plain, routed = config, with_router_loss(config)
    of = {"plain": plain, "routed": routed}
    for key in EFFECTS:
        of |= {f"plain {key}": changed(plain, key), f"routed {key}": changed(routed, key)}
    got = key_of(of)
    without, packed, always = names
    effects = {(True, True): without, (True, False): packed, (False, False): always}
    return {
        key: effects[got[f"plain {key}"] == got["plain"], got[f"routed {key}"] == got["routed"]]
        for key in EFFECTS
    }


def test_the_table_has_every_key_of_the_schema_and_no_other():
    assert list(EFFECTS) == [*dotted(), *OF_DEEPSPEED]


def test_what_a_continuation_of_a_run_may_change(config):
    def identities(configs: dict[str, Config]) -> dict[str, Any]:
        return {name: json.dumps(identity(each, Shard(0, 2))) for name, each in configs.items()}

    want = {key: effects[0] for key, effects in EFFECTS.items()}
    assert found(config, identities, ["free", "packed", "fixed"]) == want


def test_a_refusal_names_the_key(config):
    """For every key that is refused the identity has an entry of its name, or of its section's."""
    before = identity(config, Shard(0, 2))
    for key, (effect, *_) in EFFECTS.items():
        after = identity(changed(config, key), Shard(0, 2))
        names = {name for name in before | after if before.get(name, "none") != after.get(name, "none")}
        assert bool(names) is (effect == "fixed"), key
        assert not names or key in names or any(name.startswith(f"{key}.") for name in names), (key, names)


def tree(config: Config) -> dict[str, Any]:
    """The tree of a config, in the form in which a stage of a recipe gives it."""
    found = config.model_dump(mode="json", by_alias=True)
    del found["output_dir"]
    return found


def recipe_of(folder: Path, configs: list[dict[str, Any]]) -> recipe.Recipe:
    """A recipe that trains with each of them; not from a file, which takes seconds to read."""
    stages = (recipe.Stage(f"stage-{n}", "train", each, each, None, ()) for n, each in enumerate(configs))
    return recipe.Recipe(folder / "recipe.yaml", folder / "runs", tuple(stages))


def keys_of(folder: Path, configs: dict[str, Config]) -> dict[str, str]:
    stages = recipe_of(folder, [tree(each) for each in configs.values()])
    found = recipes_keys.keys(stages, lambda path, without: "", lambda stage: "")
    return dict(zip(configs, found.values(), strict=True))


def test_what_a_recipe_does_again(config, tmp_path):
    want = {key: effects[1] for key, effects in EFFECTS.items()}
    assert found(config, partial(keys_of, tmp_path), ["kept", "packed", "again"]) == want


def nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: [value] if name == "datasets" and isinstance(value, dict) else value}
    return value


def texts_of(key: str, text: str) -> Iterator[Any]:
    """The text as a value of the key, where it may be text or a list of texts."""
    for kind in kinds(dotted()[key].annotation):
        if kind is str:
            yield text
        elif get_origin(kind) is list and get_args(kind) == (str,):
            yield [text]


def test_what_a_recipe_takes_for_the_name_of_something_that_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thing.py").write_text("name = 1\n")
    got: dict[str, list[str]] = {key: [] for key in EFFECTS}
    for effect, text in (("path", "thing.py"), ("function", "thing.py:name")):
        values = {key: list(texts_of(key, text)) for key in dotted()}
        given = {key: nested(key, value[0]) for key, value in values.items() if value}
        read = recipe_of(tmp_path, list(given.values()))
        for key, stage in zip(given, read.stages, strict=True):
            found = reads(stage, read)
            assert set(found.values()) <= {tmp_path / "thing.py"}
            got[key] += [effect] * len(found)
    assert got == {key: effects[2:] for key, effects in EFFECTS.items()}


@pytest.mark.parametrize("loss_type", OBJECTIVES)
def test_every_parameter_of_an_objective_is_another_run_and_another_stage(config, tmp_path, loss_type):
    own = OBJECTIVES[loss_type].params()
    before = config.model_copy(update={OBJECTIVE: own})
    configs = {"before": before} | {
        name: config.model_copy(update={OBJECTIVE: other(own, name)})
        for name in type(own).model_fields
        if name != "loss_type"
    }
    runs = {name: json.dumps(identity(each, Shard(0, 2))) for name, each in configs.items()}
    keys = set(keys_of(tmp_path, configs).values())
    assert len(set(runs.values())) == len(keys) == len(configs), runs


def test_every_key_says_what_its_change_means():
    """The walk over the schema finds every key once, and a section's effect holds in it."""
    assert set(effects.keys()) >= set(dotted())
    for key in dotted():
        if key.startswith(("generate.", "annotate.", "data.datasets.")):
            assert effects.keys()[key].effect is Effect.RESULT, key
    assert effects.key_of("objective.beta") == effects.keys()["objective"]
    with pytest.raises(AssertionError, match="no key"):
        effects.key_of("modle.attention")


def test_other_data_are_another_run_and_other_ranks_are_not(config):
    first = identity(config, Shard(0, 2), "rows")
    assert first == identity(config, Shard(1, 2), "rows") == identity(config, Shard(0, 4), "rows")
    for content in ("other rows", None):
        assert identity(config, Shard(0, 2), content) != first
