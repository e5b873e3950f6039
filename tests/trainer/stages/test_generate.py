"""`madpo generate` on forked ranks: rows, scores and pairs, on any number of ranks, also after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from chat_server import chat_server
from harness import make_config, run_ranks, save_model, write_pairs
from patience import patient
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from madpo.trainer.config.schema import Config
from madpo.trainer.data.tokenise import TokenRules, tokenise
from madpo.trainer.data.tokenised_cache import load_groups
from madpo.trainer.formats.text_groups import TextGroup
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.stages.generate import run_generation

pytestmark = pytest.mark.ranks

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)

LENGTH = """
import os, signal
from pathlib import Path

def score(prompts, completions):
    here = Path(__file__).parent
    calls = here / "calls"
    with calls.open("a") as file:  # appended to by all ranks
        file.write("x")
    if (here / "trap").exists() and len(calls.read_text()) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return [[len(text) for text in of_prompt] for of_prompt in completions]
"""


@pytest.fixture
def tree(tmp_path, tokenizer_folder) -> dict[str, Any]:
    """23 and 5 prompts in batches of 4: the last of each split is smaller, and ranks have unlike many."""
    model = save_model(tmp_path / "model", tokenizer_folder, seed=1)
    write_pairs(tmp_path / "pairs" / "train.jsonl", 23)
    write_pairs(tmp_path / "pairs" / "test.jsonl", 5, seed=3)
    (tmp_path / "judge.py").write_text(LENGTH)
    return {
        "model": {"model_name_or_path": str(model)},
        "data": {"dataset_name": str(tmp_path / "pairs"), "dataset_test_split": "test"},
        "generate": {"num_completions": 3, "max_new_tokens": 8, "batch_size": 4},
    }


def config_of(folder: Path, tree: dict[str, Any], name: str = "run", **generate: Any) -> Config:
    settings = {**tree["generate"], **generate}
    return make_config(folder, {**tree, "output_dir": str(folder / name), "generate": settings})


def generate(shard, config: Config) -> None:
    run_generation(config)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def results(config: Config) -> dict[str, bytes]:
    """All that is meant to be read, by name."""
    folder = Path(config.output_dir)
    files = [*folder.glob("generated/*.json*"), *folder.glob("pairs/*")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_two_ranks_write_what_one_writes(tmp_path, tree, tokenizer_folder):
    """Two models, a judge and pairs."""
    other = save_model(tmp_path / "exported" / "model", tokenizer_folder, seed=2).parent
    options: dict[str, Any] = {
        "models": [tree["model"]["model_name_or_path"], str(other)],
        "judge": {"function": f"{tmp_path / 'judge.py'}:score"},
        "pairs": "bradley_terry",
    }
    one, two = config_of(tmp_path, tree, "one", **options), config_of(tmp_path, tree, "two", **options)
    run_ranks(1, generate, one)
    run_ranks(2, generate, two)
    found = results(two)
    assert found == results(one)
    names = {"train.jsonl", "test.jsonl"}
    wanted = {f"{folder}/{name}" for folder in ("generated", "pairs") for name in names}
    assert set(found) == wanted | {"generated/generation.json"}

    rows = lines(tmp_path / "two" / "generated" / "train.jsonl")
    source = lines(tmp_path / "pairs" / "train.jsonl")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in source]
    for row in rows:
        assert row["models"] == [options["models"][0]] * 3 + [str(other)] * 3
        assert row["scores"] == [len(text) for text in row["completions"]]
        assert [x == "stop" for x in row["finish"]] >= [tokens < 8 for tokens in row["tokens"]]
    texts = [tuple(row["completions"]) for row in rows]
    assert len({text for of_prompt in texts for text in of_prompt}) > 120  # of 138: no seed came twice
    facts = json.loads((tmp_path / "two" / "generated" / "generation.json").read_text())["train"]
    assert facts["prompts"] == 23 and facts["completions"] == 138
    scores = np.array([row["scores"][3:] for row in rows])
    of_model = facts["of_model"][str(other)]
    assert of_model["score_mean"] == pytest.approx(scores.mean())
    assert of_model["score_sd"] == pytest.approx(scores.std())
    assert of_model["mean_tokens"] == pytest.approx(np.mean([row["tokens"][3:] for row in rows]))
    assert facts["models"][1] == {"name": str(other), "loaded": str(other / "model"), "revision": None}
    assert facts["settings"]["pairs"] == "bradley_terry" and facts["versions"]["torch"]

    pairs = lines(tmp_path / "two" / "pairs" / "train.jsonl")
    assert len(pairs) + sum(facts["pairs"]["dropped"].values()) == 23
    for pair in pairs:
        row = next(row for row in rows if row["prompt"] == pair["prompt"])
        assert {pair["chosen"], pair["rejected"]} <= set(row["completions"])
        assert pair["margin"] == len(pair["chosen"]) - len(pair["rejected"])
    data = two.data.model_copy(update={"dataset_name": str(tmp_path / "two" / "pairs"), "max_length": 128})
    groups, read = load_groups(data, "train", AutoTokenizer.from_pretrained(tokenizer_folder))
    report = read()
    assert report["rows"] == len(pairs) and len(groups) > 15
    assert not np.isnan(groups.margins).any()


def test_a_killed_run_goes_on_where_it_was(tmp_path, tree):
    """A real worker, of a config without an objective, killed in the third of eight batches of judging;
    then neither sampling nor two batches come again."""
    judge = {"function": f"{tmp_path / 'judge.py'}:score"}
    whole, config = config_of(tmp_path, tree, "whole", judge=judge), config_of(tmp_path, tree, judge=judge)
    run_ranks(1, generate, whole)
    calls = tmp_path / "calls"
    assert calls.read_text() == "x" * 8
    calls.unlink()
    (tmp_path / "trap").touch()
    settings = config.model_dump(by_alias=True, exclude={"objective"})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    worker = [sys.executable, "-m", "madpo.launch.worker", "--task", "generate"]
    done = subprocess.run(
        [*worker, str(tmp_path / "config.yaml")],
        capture_output=True,
        text=True,
        timeout=patient(120),
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    (tmp_path / "trap").unlink()
    parts = list(Path(config.output_dir, "generated", "parts").rglob("*.json"))
    assert len(parts) == 8 + 2 and not Path(config.output_dir, "generated", "train.jsonl").exists()

    before = {path: path.stat().st_mtime_ns for path in parts}
    calls.unlink()
    run_ranks(2, generate, config)
    assert calls.read_text() == "x" * 6
    assert {path: path.stat().st_mtime_ns for path in parts} == before
    assert results(config) == results(whole)


def test_what_is_kept_is_used_only_for_the_same_work(tmp_path, tree):
    config = config_of(tmp_path, tree, limit=3)
    parts = Path(config.output_dir, "generated", "parts")

    def keys_after(changed: Config) -> set[str]:
        run_ranks(1, generate, changed)
        return {path.name for path in parts.iterdir()}

    first = keys_after(config)
    assert len(first) == 1
    assert keys_after(config_of(tmp_path, tree, limit=3, pairs="none")) == first
    keys = first
    shutil.copy(tmp_path / "judge.py", tmp_path / "other.py")
    judge = {"function": f"{tmp_path / 'other.py'}:score"}
    for change in ({"temperature": 0.5}, {"limit": 4}, {"batch_size": 2}, {"judge": judge}):
        more = keys_after(config_of(tmp_path, tree, **{"limit": 3, **change}))
        assert len(more) == len(keys) + 1, change
        keys = more
    (tmp_path / "other.py").write_text(LENGTH.replace("len(text)", "-len(text)"))
    more = keys_after(config_of(tmp_path, tree, limit=3, judge=judge))
    assert len(more) == len(keys) + 1  # the completions stay
    rows = lines(Path(config.output_dir, "generated", "train.jsonl"))
    assert all(row["scores"] == [-len(text) for text in row["completions"]] for row in rows)
    save_model(tmp_path / "model", Path(str(config.model.model_name_or_path)), seed=5)
    assert len(keys_after(config)) == len(more) + 1


def test_a_reward_model_sees_what_it_would_be_trained_on(tmp_path, tree, tokenizer_folder):
    """Against plain transformers on the tokens of `tokenise`, each completion alone, also an empty one."""
    classifier = save_model(tmp_path / "reward", tokenizer_folder, seed=6)
    model: Any = AutoModelForSequenceClassification.from_pretrained(classifier, num_labels=1)
    model.save_pretrained(classifier)
    config = config_of(tmp_path, tree, judge={"reward_model": str(classifier)}, num_completions=2)
    run_ranks(2, generate, config)
    tokenizer, rules = AutoTokenizer.from_pretrained(classifier), TokenRules(config.data.max_length)
    rows = lines(Path(config.output_dir, "generated", "train.jsonl"))
    for row in rows:
        for text, score in zip(row["completions"], row["scores"], strict=True):
            group = tokenise(TextGroup(row["prompt"], [text], []), tokenizer, rules)
            with torch.no_grad():
                want = model(input_ids=torch.tensor([group.prompt + group.completions[0]])).logits.item()
            assert score == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert np.std([score for row in rows for score in row["scores"]]) > 0.1


@pytest.mark.ranks
def test_a_reward_model_and_the_pairs_see_the_tools_of_the_prompt(tmp_path, tree, tokenizer_folder):
    """The judge scores the tokens that training on the pairs would see."""
    template = "{{ tools | tojson if tools else '' }}{% for m in messages %}{{ m.content }}{% endfor %}"
    for folder in (tmp_path / "model", save_model(tmp_path / "reward", tokenizer_folder, seed=6)):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    model: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", num_labels=1)
    model.save_pretrained(tmp_path / "reward")
    tools = [{"type": "function", "function": {"name": "look"}}]
    rows = [{"prompt": [{"role": "user", "content": f"{n} why"}], "tools": tools} for n in range(4)]
    data = tmp_path / "talk.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree["data"] = {"dataset_name": str(data)}
    judge = {"reward_model": str(tmp_path / "reward")}
    config = config_of(tmp_path, tree, judge=judge, num_completions=2, pairs="best_worst")
    run_ranks(1, generate, config)
    (groups, _) = load_groups(
        config.data.model_copy(update={"dataset_name": str(Path(config.output_dir, "pairs"))}),
        "train",
        AutoTokenizer.from_pretrained(tmp_path / "reward"),
    )
    pairs = lines(Path(config.output_dir, "pairs", "train.jsonl"))
    assert pairs and all(row["tools"] == tools for row in pairs)
    for group, row in zip((groups[i] for i in range(len(groups))), pairs, strict=True):
        for completion, score in zip(
            group.completions, (row["score_chosen"], row["score_rejected"]), strict=True
        ):
            with torch.no_grad():
                want = model(input_ids=torch.tensor([group.prompt + completion])).logits.item()
            assert score == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_a_language_model_is_no_judge(tmp_path, tree):
    """And that is said before anything is sampled."""
    for name, message in (
        (tree["model"]["model_name_or_path"], "is no reward model but a LlamaForCausalLM"),
        (str(tmp_path / "modle"), "no such file or folder; did you mean"),
        (str(tmp_path / "run"), "exported no model"),
    ):
        config = config_of(tmp_path, tree, judge={"reward_model": name})
        (tmp_path / "run" / "checkpoints").mkdir(parents=True, exist_ok=True)
        with pytest.raises(ValueError, match=rf"generate.judge.reward_model: .*{message}"):
            run_generation(config)
    assert not (Path(config.output_dir) / "generated").exists()


def test_conversations_and_a_server_that_judges(tmp_path, tree, monkeypatch):
    """Messages in, messages out; the pairs are conversations that the next stage reads."""
    folder = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    ask = [[{"role": "user", "content": f"{number} why"}] for number in range(6)]
    told = [{"role": "system", "content": "be good"}, {"role": "user", "content": "and now"}]
    prompts = [*ask, told, [*told, {"role": "assistant", "content": "it was"}]]
    data = tmp_path / "talk.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    tree["data"] = {"dataset_name": str(data)}
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with chat_server() as server:
        server.answer = lambda question, before: str(len(question))
        endpoint = {
            "url": server.url,
            "model": "judge",
            "template": "{prompt}={completion}",
            "concurrency": 2,
        }
        config = config_of(tmp_path, tree, judge={"endpoint": endpoint}, pairs="best_worst")
        run_ranks(2, generate, config)
    rows = lines(Path(config.output_dir, "generated", "train.jsonl"))
    assert [row["prompt"] for row in rows] == prompts
    assert "system: be good\n\nuser: and now=assistant: " + rows[6]["completions"][0][0]["content"] in set(
        server.questions
    )
    for row in rows:
        said = [completion[0]["content"] for completion in row["completions"]]
        assert all(completion[0]["role"] == "assistant" for completion in row["completions"])
        base = len("\n\n".join(f"{m['role']}: {m['content']}" for m in row["prompt"]) + "=assistant: ")
        assert row["scores"] == [base + len(text) for text in said]
    data_of_pairs = config.data.model_copy(
        update={"dataset_name": str(Path(config.output_dir, "pairs")), "max_length": 128}
    )
    groups, read = load_groups(data_of_pairs, "train", load_tokenizer(config.model))
    report = read()
    assert report["rows"] > 5 and (groups.margins > 0).all()


def test_a_partitioned_run_is_the_same(tmp_path, tree):
    """Eight batches over two ranks, and with `limit` three over two: one of them only keeps step."""
    for name, options in (("all", {}), ("few", {"limit": 3, "batch_size": 2})):
        tree_ = {**tree, "data": {**tree["data"], "dataset_test_split": None}} if name == "few" else tree
        options |= {"temperature": 0, "num_completions": 1}
        whole = config_of(tmp_path, tree_, f"{name}-whole", **options)
        partitioned = config_of(tmp_path, tree_, f"{name}-partitioned", **options, partitioned=True)
        run_ranks(1, generate, whole)
        run_ranks(2, generate, partitioned)
        found, wanted = results(partitioned), results(whole)
        assert found["generated/train.jsonl"] == wanted["generated/train.jsonl"]


def test_a_model_from_scratch_has_nothing_to_say(tmp_path, tree):
    scratch = {"init_config": {"model_type": "llama"}, "tokenizer_name_or_path": str(tmp_path / "model")}
    config = make_config(tmp_path, {**tree, "model": scratch, "objective": {"loss_type": "nll"}})
    with pytest.raises(ValueError, match=r"generate.models: name a model; .* is one from scratch"):
        run_generation(config)


@pytest.mark.parametrize(
    "function, message",
    [
        ("nowhere:score", "No module named 'nowhere'"),
        ("{folder}/judge.py:scores", "there is no such function in it, did you mean 'score'"),
        ("{folder}/none.py:score", "there is no file"),
        ("json:__name__", "is a str, no function"),
    ],
)
def test_a_function_that_is_not_there_is_seen_before_the_work(tmp_path, tree, function, message):
    judge = {"function": function.format(folder=tmp_path)}
    with pytest.raises(ValueError, match=rf"generate.judge.function: .*{message}"):
        run_generation(config_of(tmp_path, tree, judge=judge))
    assert not os.path.exists(tmp_path / "run")


@pytest.mark.parametrize(
    "body, message",
    [
        ("[[1.0]] * 9", r"returned lists of the lengths \[1, 1"),
        ("1.0", "returned something else: 1.0"),
        ("[['x'] * 3] * 4", "returned something else"),
        ("[[10**400] * 3] * 4", "returned something else"),
    ],
)
def test_what_a_function_returns_is_checked(tmp_path, body, message):
    from madpo.trainer.sampling.judges import FunctionJudge

    (tmp_path / "bad.py").write_text(f"def score(prompts, completions):\n    return {body}\n")
    with pytest.raises(ValueError, match=message):
        FunctionJudge(f"{tmp_path / 'bad.py'}:score")(["p"] * 4, [["a", "b", "c"]] * 4)


def test_a_score_that_is_not_finite_is_no_score(tmp_path, tree):
    from madpo.trainer.sampling.judges import open_judge

    (tmp_path / "odd.py").write_text(
        "def score(prompts, completions):\n    return [[1.5, float('nan'), float('-inf'), 1e300, None]]\n"
    )
    config = config_of(tmp_path, tree, judge={"function": f"{tmp_path / 'odd.py'}:score"})
    assert config.generate is not None and config.generate.judge is not None
    judge = open_judge(config, config.generate.judge)
    assert judge([TextGroup("p", [], [])], [list("abcde")]) == [[1.5, None, None, None, None]]
