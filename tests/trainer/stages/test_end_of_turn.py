"""An exported model stops at what ends the answers that it was trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from harness import make_config, make_tokenizer, run_ranks, save_model
from text_cases import preference
from transformers import AutoTokenizer, GenerationConfig

from madpo.trainer.config.schema import Config
from madpo.trainer.data.tokenise import TokenGroup, TokenRules, tokenise
from madpo.trainer.data.training_data import load_data
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.stages.end_of_turn import LOOKED_AT, end_of_turn, endless, stop_at, taught_end
from madpo.trainer.stages.export import run_export
from madpo.trainer.stages.train import run_training

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}END{% endfor %}"
OPEN = "{% if add_generation_prompt %}<assistant>{% endif %}"


def with_template(folder: Path, end: str, added: str = "<|end|>") -> Any:
    make_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [added]})
    tokenizer.chat_template = TURNS.replace("END", end) + OPEN
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("end", ["<|end|>", "<|end|>\n", "<eos>", "</s>", ""])
def test_the_end_is_the_special_token_behind_an_answer(tmp_path, end):
    tokenizer = with_template(tmp_path, end)
    found = end_of_turn(tokenizer)
    special = end.strip() in ("<|end|>", "<eos>")
    assert found == (tokenizer.convert_tokens_to_ids(end.strip()) if special else None)


def test_a_line_break_that_is_an_added_token_is_no_end(tmp_path):
    """As in Gemma's tokenizer: an exported model would stop at the first line break."""
    tokenizer = with_template(tmp_path, "<|end|>\n")
    tokenizer.add_tokens(["\n"])
    assert tokenizer.tokenize("a\n")[-1] == "\n"
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|end|>")


def test_a_header_that_is_special_is_not_the_end(tmp_path):
    tokenizer = with_template(tmp_path, "", added="<assistant>")
    assert end_of_turn(tokenizer) is None


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}"])
def test_without_a_template_that_renders_there_is_none(tmp_path, template):
    tokenizer = with_template(tmp_path, "<|end|>")
    tokenizer.chat_template = template
    assert end_of_turn(tokenizer) is None


def test_an_end_that_is_known_changes_nothing(tmp_path):
    tokenizer = with_template(tmp_path, "<|end|>")
    end = end_of_turn(tokenizer)
    assert end is not None

    class Model:
        generation_config = GenerationConfig(eos_token_id=[2, end])

    assert stop_at(Model, end, tokenizer) is None and stop_at(Model, None, tokenizer) is None
    assert Model.generation_config.eos_token_id == [2, end]


def taken(source: Any) -> tuple[Any, Any]:
    """The groups that a run looks at."""
    groups, indices = source.take(0, LOOKED_AT)
    return groups, indices


def test_what_is_not_scored_teaches_no_end(tmp_path):
    """A message of weight 0 at the end: the answer before it is what the model learns to end."""
    tokenizer = with_template(tmp_path, "<|end|>")
    end: Any = end_of_turn(tokenizer)
    for mask, taught in (([True, True, False, False], end), ([True, False, False, False], None)):
        groups: Any = [TokenGroup([5], [[6, end, 7, end]], [], masks=[mask])]
        source: Any = SimpleNamespace(take=lambda consumed, count, groups=groups: (groups, [0]))
        assert taught_end(*taken(source), tokenizer) == taught


ENDLESS = "none of the first 2 completions ends with a special token, so the model does not learn to stop"


@pytest.mark.parametrize(
    ("end", "rules", "is_said"),
    [
        ("<|end|>", {}, False),
        ("<eos>\n", {}, False),
        ("END", {}, True),
        ("", {}, True),
        ("{{ '<|end|>' if not loop.last }}", {}, True),
        ("", {"append_eos": "always"}, False),
    ],
)
def test_completions_without_an_end_are_told_of(tmp_path, end, rules, is_said):
    tokenizer = with_template(tmp_path, end)
    ask, yes, no = (
        {"role": role, "content": text}
        for role, text in (("user", "on?"), ("assistant", "good"), ("assistant", "bad"))
    )
    group = preference(prompt=[ask], chosen=[yes], rejected=[no])
    groups: Any = [tokenise(group, tokenizer, TokenRules(200, **rules))]
    said = endless(groups, np.arange(1), tokenizer)
    assert (said or "").startswith(ENDLESS if is_said else "") and (said is not None) == is_said


@pytest.mark.parametrize(("append_eos", "is_said"), [("auto", False), ("never", True)])
def test_texts_without_an_end_are_told_of(tmp_path, append_eos, is_said):
    tokenizer = with_template(tmp_path, "")
    group = preference(prompt="on?", chosen=" good", rejected=" bad")
    groups: Any = [tokenise(group, tokenizer, TokenRules(200, append_eos))]
    assert (endless(groups, np.arange(1), tokenizer) is not None) == is_said


@pytest.fixture
def config(tmp_path) -> Config:
    with_template(tmp_path / "tokenizer", "<|end|>\n")
    model = save_model(tmp_path / "start", tmp_path / "tokenizer", seed=1)
    rows = [
        {"messages": [{"role": "user", "content": f"film {i}"}, {"role": "assistant", "content": "good"}]}
        for i in range(8)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_config(
        tmp_path,
        {
            "model": {"model_name_or_path": str(model)},
            "data": {"dataset_name": str(tmp_path / "chat.jsonl")},
            "objective": {"loss_type": "nll"},
            "train": {"max_steps": 1},
        },
    )


def test_plain_text_does_not_end_so(config, tmp_path):
    tokenizer = load_tokenizer(config.model)
    streaming = config.model_copy(update={"data": config.data.model_copy(update={"streaming": True})})
    for either in (config, streaming):
        source: Any = load_data(either, tokenizer, True).source
        assert taught_end(*taken(source), tokenizer) == end_of_turn(tokenizer) is not None
    (tmp_path / "chat.jsonl").write_text('{"text": "the film was good"}\n')
    for either in (config, streaming):
        source = load_data(either, tokenizer, True).source
        assert taught_end(*taken(source), tokenizer) is None


def train_then_export(shard, config: Config) -> None:
    run_training(config, "test")
    shutil.rmtree(Path(config.output_dir) / "model")
    run_export(config)


@pytest.mark.ranks
def test_the_exported_model_stops_there_too(config, capfd):
    end = end_of_turn(load_tokenizer(config.model))
    run_ranks(1, train_then_export, config)
    written = json.loads((Path(config.output_dir) / "model" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [2, end]
    said = capfd.readouterr().out.replace("\n", " ")
    assert "answers end with '<|end|>', where the starting model does not stop" in said
