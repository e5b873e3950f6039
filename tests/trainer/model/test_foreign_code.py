"""Code in a model's folder is not run, and nobody is asked whether it may be."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from madpo.trainer.config.model import ModelConfig
from madpo.trainer.errors import UserError
from madpo.trainer.model.pretrained import load_pretrained
from madpo.trainer.model.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[3]
WITHOUT_CODE = {"PeftConfig", "GenerationConfig"}
"""Classes whose `from_pretrained` reads settings and nothing else."""


def own_code(folder: Path) -> Path:
    """A model whose classes lie in its folder, and make a file when they are imported."""
    folder.mkdir()
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": "own.Own"}
    config = {"model_type": "tailored", "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}})
    )
    (folder / "own.py").write_text(f"open({str(folder / 'was_run')!r}, 'w')\n")
    return folder


def test_a_model_with_code_of_its_own_is_refused_without_a_question(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    folder = own_code(tmp_path / "own")
    says = "madpo runs no code of a model's folder"
    with pytest.raises(UserError, match=f"{folder}.* {says}"):
        load_pretrained(str(folder), None, torch.float32, None, AutoModelForCausalLM, None)
    with pytest.raises(UserError, match=rf"model\.model_name_or_path: .*{folder}.* {says}"):
        load_tokenizer(ModelConfig(model_name_or_path=str(folder)))
    assert not (folder / "was_run").exists()


def test_everything_that_loads_by_a_name_says_so():
    """Left out, transformers asks on the terminal, once for every rank."""
    calls = [
        (path, call)
        for part in ("trainer", "launch")
        for path in (ROOT / part).rglob("*.py")
        if ".from_pretrained" in (text := path.read_text())
        for call in ast.walk(ast.parse(text))
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(".from_pretrained")
    ]
    for path, call in calls:
        loader = ast.unparse(call.func).split(".")[-2]
        given = {ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None}
        assert "NO_CODE" in given or loader in WITHOUT_CODE, f"{path}:{call.lineno}"
    assert len(calls) > 4
