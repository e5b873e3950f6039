"""The model card of an exported model: what it is, how to load it, how it was trained, how well it does."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Template
from transformers import PreTrainedTokenizerBase

from madpo.trainer.config.schema import Config, dump
from madpo.trainer.counted import counted
from madpo.trainer.files import read_object
from madpo.trainer.masking import masked, masked_text
from madpo.trainer.model import lora
from madpo.trainer.model.freeze import count_parameters
from madpo.trainer.pair_margins import STDERR
from madpo.trainer.reports.page import TEMPLATES
from madpo.trainer.reports.progress import metric_cell
from madpo.trainer.run_folder import last_evaluation
from madpo.trainer.state import TrainState


def model_card(
    config: Config,
    folder: Path,
    state: TrainState,
    policy: Any,
    tokenizer: PreTrainedTokenizerBase,
    adapter: bool,
) -> ModelCard:
    """The README.md of an exported adapter or of exported weights in a folder of the run.

    It says only what the run knows, and so no license.
    """
    run, base, names = folder.parent, masked(_base(config, policy)), masked(config.data.names)
    is_reward_model = config.bound_objective.is_reward_model
    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-classification" if is_reward_model else "text-generation",
        base_model=base if base and not Path(base).exists() else None,
        datasets=[name for name in names if not Path(name).exists()] or None,
        tags=["madpo", config.objective.loss_type, *(["lora"] if lora.is_adapted(policy) else [])],
    )
    code = usage(
        folder,
        is_reward_model,
        adapter,
        chat=tokenizer.chat_template is not None,
        ends_with_eos=config.data.append_eos != "never" and tokenizer.eos_token is not None,
    )
    needs = f"\n\n{_on_base(base)}" if adapter and base else ""
    kind = "reward model" if is_reward_model else "language model"
    what = f"LoRA adapter that makes a {kind} of" if adapter else f"{kind} trained from"
    start = _code(base) if base else "random weights"
    return ModelCard.from_template(
        data,
        template_str=(TEMPLATES / "model_card.md.jinja").read_text(encoding="utf-8"),
        title=_text(run.name),
        summary=f"A {what} {start}, by madpo with the objective `{config.objective.loss_type}` on "
        f"{', '.join(map(_code, names))}.",
        sections={
            "Use": f"{_block('python', code)}{needs}",
            "Training": _training(config, run, state, policy),
            "Data": _data(run),
            "Held-out metrics": _held_out(run),
            "Configuration": _block("yaml", dump(config)),
        },
    )


def usage(folder: Path, is_reward_model: bool, adapter: bool, chat: bool, ends_with_eos: bool) -> str:
    """Code that loads an exported folder, and lets it answer or scores a pair of answers.

    `chat`: the tokenizer has a chat template. `ends_with_eos`: a reward model scores plain text behind EOS.
    """
    template = Template(
        (TEMPLATES / "usage.py.jinja").read_text(encoding="utf-8"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return template.render(
        folder=json.dumps(str(folder.resolve())),
        is_reward_model=is_reward_model,
        adapter=adapter,
        chat=chat,
        ends_with_eos=ends_with_eos,
    )


def _base(config: Config, policy: Any) -> str | None:
    if lora.is_adapted(policy):
        return policy.peft_config[lora.POLICY].base_model_name_or_path
    return config.model.model_name_or_path


def _on_base(base: str) -> str:
    """Where the base model of an adapter is to be had."""
    if not Path(base).is_dir():
        place = f"https://huggingface.co/{quote(base)}"
        return f"Its base model is [{_text(base)}]({place}), which is fetched from the hub."
    return (
        f"Its base model is not on the hub but in the folder {_code(lora.whole_path(base))}. On another "
        "machine, copy that folder too, and name its place as `base_model_name_or_path` in "
        "`adapter_config.json`."
    )


def _training(config: Config, run: Path, state: TrainState, policy: Any) -> str:
    trained, total = count_parameters(policy)
    objective = config.objective.model_dump(mode="json", by_alias=True)
    values = ", ".join(f"{key} {value}" for key, value in objective.items() if key != "loss_type")
    facts = read_object(run / "run.json")
    versions = _text(", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items()))
    seen = {"step": state.step, "prompt": state.consumed, "token": state.num_tokens}
    rows = {
        "objective": f"`{config.objective.loss_type}` ({values}); equation: docs/objectives.md of madpo",
        "seen": ", ".join(counted(number, noun) for noun, number in seen.items()),
        "trained parameters": f"{trained:,} of {total:,}",
        "precision": "bfloat16" if config.train.bf16 else "float32",
        "command": _code(masked_text(facts["command"])) if facts else "",
        "hardware": _text(f"{facts['world_size']} x {facts['device']}") if facts else "",
        "versions": versions,
    }
    return _table(("", ""), ((key, value) for key, value in rows.items() if value))


def _data(run: Path) -> str:
    """A table of what was read from every split, and of why examples were dropped."""
    report = read_object(run / "data_report.json")
    rows = [
        (
            _text(split),
            facts["rows"],
            facts["groups"],
            facts["tokens"],
            _text("; ".join(f"{count} {reason}" for reason, count in facts["dropped"].items())) or "none",
        )
        for split, facts in report.items()
    ]
    return _table(("split", "rows", "prompts", "tokens", "dropped"), rows) if rows else ""


def _held_out(run: Path) -> str:
    record = last_evaluation(run)
    names = [name for name in record if name.startswith("eval_") and not name.endswith(STDERR)]
    rows = [(_text(name.removeprefix("eval_")), metric_cell(record, name)) for name in names]
    return _table(("metric", "value"), rows) if rows else ""


def _text(words: str) -> str:
    """Words on one line in which nothing is markup."""
    escaped = html.escape(_on_one_line(words), quote=False)
    return re.sub(r"[\\`*\[\]]|(?<!\w)_|_(?!\w)", r"\\\g<0>", escaped)


def _code(words: str) -> str:
    """Words as inline code on one line, behind more backticks than stand together in them."""
    words = _on_one_line(words)
    fence = "`" * (_longest_row_of_backticks(words) + 1)
    space = " " if words.startswith("`") or words.endswith("`") else ""
    return f"{fence}{space}{words}{space}{fence}"


def _on_one_line(words: str) -> str:
    return " ".join("".join(letter if letter.isprintable() else " " for letter in words).split())


def _block(language: str, code: str) -> str:
    """A block of code, behind more backticks than stand together in it."""
    fence = "`" * max(3, _longest_row_of_backticks(code) + 1)
    return f"{fence}{language}\n{code}{fence}"


def _longest_row_of_backticks(words: str) -> int:
    return max(map(len, re.findall("`+", words)), default=0)


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
