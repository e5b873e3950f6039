"""The model card of an exported model: what it is, how to load it, how it was trained, how well it does."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from madpo.trainer.config.schema import Config, dump
from madpo.trainer.model import lora
from madpo.trainer.model.freeze import count_parameters
from madpo.trainer.run_folder import last_evaluation
from madpo.trainer.state import TrainState


def model_card(config: Config, run: Path, state: TrainState, policy: Any, adapter: bool) -> str:
    """The README.md of an exported adapter or of exported weights: YAML front matter, then text.

    It says only what the run knows: no license, and no paths except those in the config.
    """
    base, names = _base(config, policy), config.data.names
    facts = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-classification" if _scores(config) else "text-generation",
        **({"base_model": base} if base and not Path(base).exists() else {}),
        **({"datasets": on_hub} if (on_hub := [name for name in names if not Path(name).exists()]) else {}),
        "tags": ["madpo", config.objective.loss_type, *(["lora"] if lora.is_adapted(policy) else [])],
    }
    sections = {
        "Use": _use(config, base, adapter, policy),
        "Training": _training(config, run, state, policy),
        "Data": _data(run),
        "Held-out metrics": _held_out(run),
        "Configuration": f"```yaml\n{dump(config)}```",
    }
    text = "".join(f"\n## {title}\n\n{body}\n" for title, body in sections.items() if body)
    kind = "reward model" if _scores(config) else "language model"
    title = f"LoRA adapter that makes a {kind} of" if adapter else f"{kind} trained from"
    start = f"`{base}`" if base else "random weights"
    return (
        f"---\n{yaml.safe_dump(facts, sort_keys=False)}---\n\n# {run.name}\n\n"
        f"A {title} {start}, by madpo with the objective `{config.objective.loss_type}` on "
        f"{', '.join(f'`{name}`' for name in names)}.\n{text}"
    )


def _scores(config: Config) -> bool:
    return config.bound_objective.is_reward_model


def _base(config: Config, policy: Any) -> str | None:
    if lora.is_adapted(policy):
        return policy.peft_config[lora.POLICY].base_model_name_or_path
    return config.model.model_name_or_path


def _use(config: Config, base: str | None, adapter: bool, policy: Any) -> str:
    kind = "SequenceClassification" if _scores(config) else "CausalLM"
    library, name, options = "transformers", f"AutoModelFor{kind}", ""
    if adapter:
        library, name = "peft", f"AutoPeftModelFor{kind}"
    if adapter and _scores(config):  # the base model's own config does not have these
        options = f", num_labels=1, pad_token_id={policy.config.pad_token_id}"
    needs = f"\n\nIts base model is `{base}`, and must be available under that name." if adapter else ""
    return (
        f"```python\nfrom {library} import {name}\nfrom transformers import AutoTokenizer\n\n"
        f'folder = "..."  # this one\nmodel = {name}.from_pretrained(folder{options})\n'
        f"tokenizer = AutoTokenizer.from_pretrained(folder)\n```{needs}"
    )


def _training(config: Config, run: Path, state: TrainState, policy: Any) -> str:
    trained, total = count_parameters(policy)
    objective = config.objective.model_dump(mode="json", by_alias=True)
    values = ", ".join(f"{key} {value}" for key, value in objective.items() if key != "loss_type")
    facts = _read(run / "run.json")
    versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
    rows = {
        "objective": f"`{config.objective.loss_type}` ({values}); equation: docs/objectives.md of madpo",
        "seen": f"{state.step} steps, {state.consumed} prompts, {state.num_tokens} tokens",
        "trained parameters": f"{trained:,} of {total:,}",
        "precision": "bfloat16" if config.train.bf16 else "float32",
        "command": f"`{facts['command']}`" if facts else "",
        "hardware": f"{facts['world_size']} x {facts['device']}" if facts else "",
        "versions": versions,
    }
    return _table(("", ""), ((key, value) for key, value in rows.items() if value))


def _data(run: Path) -> str:
    """A table of what was read from every split, and of why examples were dropped."""
    report = _read(run / "data_report.json")
    rows = [
        (
            split,
            facts["rows"],
            facts["groups"],
            facts["tokens"],
            "; ".join(f"{count} {reason}" for reason, count in facts["dropped"].items()) or "none",
        )
        for split, facts in report.items()
    ]
    return _table(("split", "rows", "prompts", "tokens", "dropped"), rows) if rows else ""


def _held_out(run: Path) -> str:
    record = last_evaluation(run).items()
    rows = [(k.removeprefix("eval_"), f"{value:.4f}") for k, value in record if k.startswith("eval_")]
    return _table(("metric", "value"), rows) if rows else ""


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
