"""Lines of JSON Lines files that are rows, and those that are none."""

from __future__ import annotations

import pytest

from madpo.trainer.formats.json_lines import parse_json_line, respelled

BAD_LINES = [
    (b'{"a": NaN}', "NaN is not a number"),
    (b'{"a": -Infinity}', "-Infinity is not a number"),
    (b'{"a": {"b": [-1e400]}}', "-1e400 is too large a number"),
    (b'{"a": 1, "a": 2}', "key 'a' stands twice"),
    (b'{"a": 1', "not JSON"),
    (b"[1]", "expected a JSON object, got list"),
    (b'{"a": "\xff"}', "not UTF-8"),
    ('{"a": 1}'.encode("utf-16"), "iconv"),
    (b'{"a": "\\ud83d"}', r"half a character \(a lone surrogate\), in .*ud83d"),
    (b'{"\\udc00": 1}', "half a character"),
    (b'{"a": ' + b"9" * 5000 + b"}", "a number has thousands of digits"),
    (b'{"a":' * 3000 + b"1" + b"}" * 3000, "nested too deeply"),
]


@pytest.mark.parametrize("raw, message", BAD_LINES, ids=[message[:20] for _, message in BAD_LINES])
def test_bad_lines_are_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        parse_json_line(raw)


def test_a_byte_order_mark_and_crlf_are_fine():
    assert parse_json_line(b'\xef\xbb\xbf{"a": 1}\r\n') == {"a": 1}


def test_a_character_of_two_escapes_is_whole():
    assert parse_json_line(b'{"a": "\\ud83d\\ude00"}') == {"a": "\N{GRINNING FACE}"}


def test_lines_that_are_no_rows_are_named():
    with pytest.raises(ValueError, match="key 'b' stands twice"):
        parse_json_line(b'{"a": {"b": 1, "b": 2}}')
    with pytest.raises(ValueError, match="at column 6"):
        parse_json_line(b'{"a":}')


@pytest.mark.parametrize("number", ["1.10", "1e5", "1E-7", "-0", "0.12345678901234567890", "1.0e0"])
def test_a_number_that_json_writes_otherwise_is_known(number):
    (value,) = parse_json_line(f'{{"a": [{number}, 1.5, 12345678901234567890]}}'.encode()).values()
    assert [respelled(x) for x in value] == [True, False, False] and respelled({"b": value})
    assert value == [float(number), 1.5, 12345678901234567890]
