"""Read the arguments of TRL's config classes from a Python script, by its syntax tree. Nothing is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from madpo.trainer.errors import UserError

CONFIGS = ("DPOConfig", "SFTConfig", "RewardConfig", "KTOConfig", "CPOConfig", "ORPOConfig")
LORA = {"r": "lora_r", "target_modules": "lora_target_modules", "modules_to_save": "lora_modules_to_save"}
PEFT_DEFAULTS = {"use_peft": True, "lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
"""What a LoraConfig says without arguments."""
FIRST = {"load_dataset": "dataset_name", "from_pretrained": "model_name_or_path"}
"""Function -> the key that its first argument is."""


def read(text: str, origin: str) -> tuple[dict[str, Any], str, list[str]]:
    """Keys, the task, and what the script computes when it runs. Raises UserError without a config."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise UserError(f"{origin}:{error.lineno}: {error.msg}") from None
    constants = dict(_constants(tree))
    keys, program, by_hand = dict[str, Any](), "", list[str]()
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = _name(call.func)
        if name in CONFIGS:
            program = name.removesuffix("Config").lower()
        for key, node in _arguments(call, name):
            try:
                keys[key] = _value(node, constants)
            except ValueError:
                by_hand.append(f"{key}: the script computes it: {ast.unparse(node)}")
    if not program:
        raise UserError(f"{origin}: calls none of {', '.join(CONFIGS)}")
    return keys, program, by_hand


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _arguments(call: ast.Call, name: str) -> Iterator[tuple[str, ast.expr]]:
    """(TRL's key, value) for what a call says about the training."""
    named = [(argument.arg, argument.value) for argument in call.keywords if argument.arg is not None]
    if name in CONFIGS or name == "ModelConfig":
        yield from named
    elif name == "LoraConfig":
        yield from ((key, ast.Constant(value)) for key, value in PEFT_DEFAULTS.items())
        yield from ((LORA.get(key, key), value) for key, value in named if key not in ("bias", "task_type"))
    elif name == "BitsAndBytesConfig":
        yield from ((key, value) for key, value in named if key in ("load_in_4bit", "load_in_8bit"))
    elif name in FIRST and call.args:
        is_model = name == "load_dataset" or "Model" in ast.unparse(call.func)
        yield from [(FIRST[name], call.args[0])] if is_model else []
        yield from (("dataset_train_split", value) for key, value in named if key == "split")
    elif name.endswith("Trainer"):
        yield from (
            ("model_name_or_path", value)
            for key, value in named
            if key == "model" and isinstance(value, ast.Constant)
        )


def _constants(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """Names that the script gives a literal value once."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            try:
                yield node.targets[0].id, ast.literal_eval(node.value)
            except ValueError:
                continue


def _value(node: ast.expr, constants: dict[str, Any]) -> Any:
    """The value of a literal, or of a name for one. Raises ValueError for anything else."""
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch."):
        return node.attr
    return ast.literal_eval(node)
