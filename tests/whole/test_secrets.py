"""Secrets in every place of a config and on the command line: no file of the run and no output has one.

The run's names are hostile too: what they hold is no markup in the card of the model.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
from commands import command
from harness import run_ranks, save_model, write_pairs
from huggingface_hub import ModelCard

from madpo.launch import worker
from madpo.trainer import outcome
from madpo.trainer.config import strict_yaml
from madpo.trainer.config.schema import load
from madpo.trainer.errors import Exit
from madpo.trainer.sampling.judges import check_judge

SECRET = "5entinel"
NAME = "run <script>alert(1)<!-- \n# head `code` ``` [link](x) | _e_ \x1b[1m"
SETTINGS = {
    "objective": {"loss_type": "dpo"},
    "train": {
        "bf16": False,
        "global_batch_size": 8,
        "micro_batch_tokens": 256,
        "max_steps": 2,
        "eval_on_start": False,
    },
    "generate": {
        "judge": {
            "endpoint": {
                "url": f"https://user:{SECRET}-a@host/v1?api_key={SECRET}-b&version={SECRET}-c",
                "model": "judge",
                "parameters": {"apiKey": f"{SECRET}-d", "headers": {"X-Tenant": f"{SECRET}-e"}},
            }
        }
    },
    "deepspeed": {
        "zero_optimization": {"stage": 2},
        "comet": {"enabled": False, "api_key": f"{SECRET}-f"},
    },
}
OVERRIDES = (
    f"generate.judge.endpoint.parameters.token={SECRET}-g",
    f"generate.judge.endpoint.parameters.extra={{password: {SECRET}-h, url: 'ftp://me:{SECRET}-i@x/y'}}",
)


class Run(NamedTuple):
    path: str  # of the config
    folder: Path
    output: Path  # what was printed


def work(shard, output: Path, *arguments: str) -> int:
    """The exit status of a rank; what it prints goes into a file."""
    with output.open("a") as file, redirect_stdout(file), redirect_stderr(file):
        return worker.main(list(arguments))


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer_folder) -> Run:
    """A run that was trained, and one more start that fails."""
    folder = tmp_path_factory.mktemp("secrets")
    model = save_model(folder / "start `x` <b>", tokenizer_folder, seed=1)
    pairs = write_pairs(folder / "pairs" / "train.jsonl", 24)
    tree = {
        "output_dir": str(folder / NAME),
        "model": {"model_name_or_path": str(model)},
        "data": {"dataset_name": str(pairs), "max_length": 64, "cache_dir": str(folder / "cache")},
        **SETTINGS,
    }
    path = folder / "config.yaml"
    path.write_text(strict_yaml.dump(tree))
    assert load(path).output_dir == str(folder / NAME)
    run = Run(str(path), folder / NAME, folder / "printed")
    assert run_ranks(1, work, run.output, run.path, *OVERRIDES) == [Exit.DONE]
    dataset = f"data.dataset_name=https://user:{SECRET}-j@host/x.jsonl?sig={SECRET}-k"
    assert run_ranks(1, work, run.output, run.path, *OVERRIDES, dataset) == [Exit.USAGE]
    return run


def files_with_a_secret(folder: Path) -> Iterator[str]:
    for file in folder.rglob("*"):
        if file.is_file() and SECRET.encode() in file.read_bytes():
            yield file.name


def test_no_file_of_the_run_and_no_output_has_a_secret(run):
    assert command("report", str(run.folder))[0] == 0
    assert {"config.yaml", "run.json", "log.txt", "outcome.json", "report.html", "model"} <= set(
        os.listdir(run.folder)
    )
    assert list((run.folder / "checkpoints").glob("*/*optim_states.pt"))
    assert list(files_with_a_secret(run.folder)) == []
    said = outcome.read(run.folder)
    assert said is not None and "https://***@host/x.jsonl?sig=***" in said.text
    assert SECRET not in run.output.read_text() and "https://***@host" in run.output.read_text()
    assert "token=" in (run.folder / "run.json").read_text()


def test_the_config_of_the_run_is_read_and_its_judge_asks_for_what_was_masked(run):
    config = load(run.folder)
    assert config.generate is not None and config.generate.judge is not None
    with pytest.raises(ValueError, match=r"endpoint.url: was masked .*; give it again, or put"):
        check_judge(config.generate.judge)
    path = shutil.copy(run.folder / "config.yaml", run.output.parent / "again.yaml")
    kwargs = "data.chat_template_kwargs={api_key: '***'}"
    with pytest.raises(ValueError, match=r"data.chat_template_kwargs.api_key: was masked when this file was"):
        load(path, [kwargs])


@pytest.mark.parametrize("options", [[], ["--plain"]])
def test_a_config_that_is_shown_has_no_secret(run, options):
    status, shown, _ = command("config", *options, run.path, *OVERRIDES)
    assert status == 0 and "api_key: '***'" in shown and SECRET not in shown


def test_names_are_no_markup_in_the_card(run):
    card = ModelCard.load(run.folder / "model" / "README.md")
    text, front = card.text, card.data.to_dict()
    assert front["library_name"] == "transformers" and "base_model" not in front
    title, summary = text.strip().splitlines()[0], text.strip().splitlines()[2]
    assert title == r"# run &lt;script&gt;alert(1)&lt;!-- # head \`code\` \`\`\` \[link\](x) | \_e\_ \[1m"
    assert re.search(r"trained from ``/\S+/start `x` <b>``, by madpo", summary)
    headings = re.findall(r"^#+ .*", re.sub(r"(?ms)^(````*)\w+\n.*?^\1$", "", text), re.MULTILINE)
    assert headings[1:] == ["## Use", "## Training", "## Data", "## Configuration"]
