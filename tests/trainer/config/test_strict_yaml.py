"""Faults in a YAML text are named in words for what was typed, with the line where it was typed."""

from __future__ import annotations

import pytest

from madpo.trainer.config.strict_yaml import parse, read


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
