"""The code of a model card runs as it is printed, for every kind of export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import save_classifier, save_model
from lora_cases import stored_adapter
from transformers import AutoTokenizer

from madpo.trainer.reports.model_card import usage

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer_folder) -> Path:
    """Folders `model`, `adapter` and `reward` with a chat template; not to be written into."""
    folder = tmp_path_factory.mktemp("exported")
    save_model(folder / "model", tokenizer_folder, seed=1)
    stored_adapter(folder / "adapter", folder / "model", tokenizer_folder)
    save_classifier(folder / "reward", tokenizer_folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = TEMPLATE
    for name in ("model", "adapter", "reward"):
        tokenizer.save_pretrained(folder / name)
    return folder


def run(code: str) -> dict[str, Any]:
    """The names that the code has set."""
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


@pytest.mark.parametrize("name", ["model", "adapter"])
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "text"])
def test_a_language_model_answers_wherever_the_code_is_run(
    exported, tmp_path, monkeypatch, capsys, name, chat
):
    monkeypatch.chdir(exported)  # where the run was started, with a relative output_dir
    code = usage(Path(name), False, name == "adapter", chat, ends_with_eos=True)
    monkeypatch.chdir(tmp_path)
    names = run(code)
    tokenizer, prompt = names["tokenizer"], tokenizer_text(names)
    assert prompt == ("user: How do I boil an egg?\n" if chat else "The best way to boil an egg is")
    answer = names["output"][0, names["prompt"].shape[1] :]
    assert len(answer)
    assert capsys.readouterr().out == tokenizer.decode(answer, skip_special_tokens=True) + "\n"
    assert (type(names["model"]).__name__ == "PeftModelForCausalLM") is (name == "adapter")


def tokenizer_text(names: dict[str, Any]) -> str:
    return names["tokenizer"].decode(names["prompt"][0], skip_special_tokens=True)


@pytest.mark.parametrize(("chat", "ends_with_eos"), [(True, True), (False, True), (False, False)])
def test_a_reward_model_scores_a_pair(exported, capsys, chat, ends_with_eos):
    names = run(usage(exported / "reward", True, False, chat, ends_with_eos))
    tokenizer, model = names["tokenizer"], names["model"]
    text = "How do I boil an egg? No." + tokenizer.eos_token * ends_with_eos
    if chat:
        text = "user: How do I boil an egg?\nassistant: No.\n"
    with torch.no_grad():
        ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
        expected = model(torch.tensor([ids])).logits.item()
    assert names["rejected"] == pytest.approx(expected, rel=1e-5)
    assert f"margin {names['chosen'] - names['rejected']:.3f};" in capsys.readouterr().out
