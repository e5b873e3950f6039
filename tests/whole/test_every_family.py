"""Every causal family of transformers as a tiny model: exact, or refused in one line at the start."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from every_family import EVERY_FAMILY, tiny_config
from families import packed_logps, plain_logps
from kernel_cases import relative_error
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from madpo.trainer.errors import UserError
from madpo.trainer.model.attention import prefix_sharing
from madpo.trainer.model.pretrained import make_with_attention, refuse_more_than_text, without_dropout
from madpo.trainer.model.startup.attention import choose_attention
from madpo.trainer.model.startup.checks import check_head, check_noise

CPU = torch.device("cpu")
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "families.md"
HEADINGS = {
    "shared": "Rows are shared",
    "own": "Rows of their own",
    "refused": "Refused",
    "text": "More than text",
    "untried": "Not tried",
}

TOLERANCE = {"xlstm": 3e-4}
"""xLSTM divides by a sum with an eps, which it scales by the largest gate of a chunk, padding too."""


def documented() -> dict[str, str]:
    """`model_type` -> the key of the list that the page has it in."""
    section = DOCUMENT.read_text().partition("## Every family")[2].partition("\n## ")[0]
    out = {}
    for key, heading in HEADINGS.items():
        (line,) = re.findall(rf"^\*\*{heading}.*$", section, re.MULTILINE)
        for family in re.findall(r"`([^`]+)`", line.partition(":")[2]):
            assert family not in out, family
            out[family] = key
    return out


WHERE = documented()


def made(family: str, attention: str | None) -> Any:
    config = without_dropout(tiny_config(family))

    def seeded(**options: Any) -> Any:
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)

    model = make_with_attention(seeded, attention).eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def test_the_page_names_every_family():
    assert sorted(WHERE) == EVERY_FAMILY


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in EVERY_FAMILY if WHERE.get(family) != "untried"])
def test_what_becomes_of_a_family_is_on_the_page(family):
    prefix_sharing.register()
    if WHERE[family] == "text":
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family]())
        with pytest.raises(UserError, match="reads more than text"):
            refuse_more_than_text(family, model)
        return
    model = made(family, prefix_sharing.NAMES["sdpa"])
    try:
        choose_attention(model, "auto", CPU)
        check_head(model, CPU)
        check_noise(model, CPU)
    except UserError as error:
        assert WHERE[family] == "refused" and "\n" not in str(error)
        return
    assert WHERE[family] == ("shared" if prefix_sharing.shares_rows(model) else "own")
    theirs = made(family, None)
    for each in (model, theirs):
        refuse_more_than_text(family, each.train())
    got, want = packed_logps(model), plain_logps(theirs)
    tolerance = TOLERANCE.get(family, 1e-5)
    assert relative_error(got, want) < tolerance
    weights = torch.randn(len(want))
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    truth = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    largest = max(gradient.norm() for gradient in truth.values())
    for name, parameter in model.named_parameters():
        if name in truth and truth[name].norm() > 1e-5 * largest:
            assert relative_error(parameter.grad, truth[name]) < max(1e-3, 10 * tolerance), name
