"""YAML that grows without bounds is refused at its line; what people write with aliases is read."""

from __future__ import annotations

import pytest

from madpo.trainer.config.strict_yaml import parse
from madpo.trainer.errors import UserError

BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
CHAIN = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 200))
MAPPINGS = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}\n" for n in range(1, 40)
)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (BOMB, 5),
        (MAPPINGS, 15),
        (CHAIN, 50),
        ("x: &x [*x]", 1),
        ("x: &x\n  y: *x", 1),
        ("[" * 60 + "]" * 60, 1),
        ("[" + "1," * 200_000 + "]", 1),
    ],
)
def test_what_grows_without_bounds_is_refused_at_its_line(text, line):
    with pytest.raises(UserError, match=rf"^f.yaml:{line}: more than 100,000 values or 50 levels, with"):
        parse(text, "f.yaml")


@pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 5_000, "x: " + "1" * 5_000])
def test_what_python_cannot_read_is_refused(text):
    with pytest.raises(UserError, match=r"^f.yaml: (nested too deeply|Exceeds the limit)"):
        parse(text, "f.yaml")


def test_aliases_are_read():
    tree = parse("base: &base {lr: 1e-6}\nruns: [*base, *base]\nname: &n x\nother: *n", "f.yaml")
    assert tree["runs"] == [{"lr": 1e-6}, {"lr": 1e-6}] and tree["other"] == "x"
