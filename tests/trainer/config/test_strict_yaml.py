"""Faults in a YAML text are named in words for what was typed, with the line where it was typed."""

from __future__ import annotations

import pytest

from madpo.trainer.config.strict_yaml import parse, read
from madpo.trainer.errors import UserError

BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
CHAIN = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 200))
MAPPINGS = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}\n" for n in range(1, 40)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a:\n\tb: 1\n", ":2: a tab; indent with spaces"),
        ("a: 1\nmodel\nb: c\n", ":2: a key without a colon behind it"),
        ("a: {b: 1\nc: 2\n", ":1: a bracket that is not closed, or a comma missing"),
        ("a: 1\nb: [1\n", ":2: a bracket that is not closed, or a comma missing"),
        ("a: 'x\nb: y\n", ":1: a quote that is not closed"),
        ("a: b: c\n", ":1: a second colon in a line, or a line that is indented too far"),
        ("a:\n  b: 1\n c: 2\n", ":3: a line that is indented otherwise than those beside it"),
        ("a: @x\n", ":1: a value that begins with '@'; quote it"),
        ("freeze: [*.layers.0.*]\n", ":1: a value that begins with * or &; quote it"),
        ("a: 1\na: 2\n", ":2: key 'a' stands twice; remove one"),
    ],
)
def test_a_fault_of_syntax(text, said):
    with pytest.raises(ValueError) as caught:
        parse(text, "my.yaml")
    assert str(caught.value) == f"my.yaml{said}"


def test_another_encoding(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_bytes("a: gr\xfcn\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"no text in UTF-8 \(byte 5\); save it as such$"):
        read(path)


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
