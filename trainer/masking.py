"""Mask secrets in what leaves the process: files of a run, command lines, messages.

A value is a secret by its name, as that of `api_key` or of anything below `headers`, or by its place in a
URL: user and password before the host, values behind `?`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

MASK = "***"

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_ANYWHERE = {
    *("password", "passwd", "passphrase", "pwd", "secret", "secrets", "credential", "credentials"),
    *("authorization", "apikey", "apikeys", "bearer", "cookie", "cookies", "headers"),
}
_AT_THE_END = {"key", "keys", "token", "auth"}
_PLACES = {"env", "file", "path", "name"}
"""Last words of names whose value says where a secret is, as `api_key_env`."""
_OF_A_TOKENIZER = {
    *("bos", "eos", "pad", "unk", "sep", "cls", "mask", "stop", "start", "end", "eot", "eom", "per"),
    *("image", "audio", "video", "think", "special"),
}
"""Words before `token` in names of tokens that are text."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>`]+")
_USER = re.compile(r"(?<=://)[^/?#]*@")
_QUERY = re.compile(r"([?&#;][^=?&#;]*=)([^&#;]*)")

_ASSIGNED = re.compile(r"([\w.-]+)=('[^']*'|\"[^\"]*\"|[^\s,;)\]}]+)")
_ENTRY = re.compile(
    r"((?:[{,]\s*|(?=['\"]))(?P<quote>['\"]?)(?P<name>[\w-]+)(?P=quote)\s*:\s*)"
    r"(?P<value>'[^']*'|\"[^\"]*\"|[^\s,}\]]+)"
)
_BEARER = re.compile(r"\b(bearer\s+)[\w.~+/=-]{4,}", re.IGNORECASE)
_LOGIN = re.compile(r"[^\s:/'\"@]+:[^\s/'\"@]+@(?=[\w.-])")
_KNOWN_FORM = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|xox[abp]-|AKIA)(?=[\w-]*\d)[\w-]{16,}")


def names_secret(name: str) -> bool:
    """Whether a value of this name is a secret."""
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or words[-1] in _PLACES:
        return False
    if words[-1] == "token" and words[-2:-1] and words[-2] in _OF_A_TOKENIZER:
        return False
    return words[-1] in _AT_THE_END or not _ANYWHERE.isdisjoint(words)


def masked(value: Any, is_secret: bool = False) -> Any:
    """A tree of mappings and lists with MASK in place of each secret; with `is_secret`, of each value."""
    if isinstance(value, Mapping):
        return {key: masked(child, is_secret or names_secret(str(key))) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [masked(child, is_secret) for child in value]
    if is_secret and _is_given(value):
        return MASK
    return _URL.sub(_masked_url, value) if isinstance(value, str) else value


def masked_text(text: str) -> str:
    """A message with MASK in place of what looks like a secret: in URLs, in printed mappings, behind `=`, and
    in the form of well-known keys."""
    text = _URL.sub(_masked_url, text)
    text = _ENTRY.sub(_masked_entry, text)
    text = _ASSIGNED.sub(_masked_assignment, text)
    text = _BEARER.sub(rf"\1{MASK}", text)
    text = _LOGIN.sub(f"{MASK}@", text)
    return _KNOWN_FORM.sub(MASK, text)


def secrets_in(value: Any, is_secret: bool = False) -> Iterator[str]:
    """The secrets that `masked` takes out of a tree."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from secrets_in(child, is_secret or names_secret(str(key)))
    elif isinstance(value, list | tuple):
        for child in value:
            yield from secrets_in(child, is_secret)
    elif is_secret and _is_given(value):
        yield str(value)
    elif isinstance(value, str):
        for url in _URL.findall(value):
            yield from (user.removesuffix("@") for user in _USER.findall(url))
            yield from (given for _, given in _QUERY.findall(url) if given)


def masked_keys(value: Any, key: str = "") -> Iterator[str]:
    """The dotted keys of a tree whose value was masked, and so has to be given again."""
    if isinstance(value, Mapping):
        for name, child in value.items():
            yield from masked_keys(child, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for child in value:
            yield from masked_keys(child, key)
    elif value == MASK or (isinstance(value, str) and any(MASK in url for url in _URL.findall(value))):
        yield key


def _is_given(value: Any) -> bool:
    return value is not None and not isinstance(value, bool) and value != ""


def _masked_url(match: re.Match[str]) -> str:
    url = _USER.sub(f"{MASK}@", match[0])
    return _QUERY.sub(lambda part: part[1] + (MASK if part[2] else ""), url)


def _masked_entry(match: re.Match[str]) -> str:
    return match[1] + MASK if names_secret(match["name"]) else match[0]


def _masked_assignment(match: re.Match[str]) -> str:
    name = match[1].rpartition(".")[2]
    return f"{match[1]}={MASK}" if names_secret(name) and name != "key" else match[0]
