"""What is odd in an example that can be trained on, and what the example claims, so that one which repeats or
contradicts another is found. Nothing here changes an example: oddities are counted, and said once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import xxhash

from madpo.trainer.formats.chat_message import SPOKEN, Messages, arguments_in, text_in, without_padding
from madpo.trainer.formats.json_lines import object_in
from madpo.trainer.formats.text_groups import Text, TextGroup

EMPTY_PROMPT = "the prompt is empty"
EMPTY_COMPLETION = "a completion is empty"
NO_OBJECT = "arguments of a tool call are no JSON object"
NULL = "arguments of a tool call hold null, which is kept"

CHARACTERS = {
    "text holds a byte order mark (U+FEFF)": "\ufeff",
    "text holds replacement characters (U+FFFD), as after a wrong decoding": "\ufffd",
    "text holds control characters": r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]",
}
"""What is said of a text -> a pattern of the characters that it is said for."""

_ANY = re.compile("|".join(CHARACTERS.values()))


def oddities_of(group: TextGroup, has_prompt: bool) -> list[str]:
    """What is odd in the texts of an example. `has_prompt` is false for a layout without a prompt."""
    found: list[str] = []
    if has_prompt and _is_blank(group.prompt, "user"):
        found.append(EMPTY_PROMPT)
    if any(_is_blank(completion, "assistant") for completion in group.completions):
        found.append(EMPTY_COMPLETION)
    found += group.odd
    parts = (group.prompt, *group.completions)
    arguments = [x for part in parts if not isinstance(part, str) for x in arguments_in(part)]
    if not all(isinstance(x, dict) or object_in(x) is not None for x in arguments):
        found.append(NO_OBJECT)
    if any(isinstance(x, dict) and x != without_padding(x) for x in arguments):
        found.append(NULL)
    texts = [text for part in parts for text in ([part] if isinstance(part, str) else _texts(part))]
    suspect = [text for text in texts if not text.isascii() or not text.isprintable()]
    if any(_ANY.search(text) for text in suspect):
        found += [name for name, pattern in CHARACTERS.items() if any(re.search(pattern, x) for x in suspect)]
    return found


def _is_blank(text: Text, role: str) -> bool:
    """Whether a text, or the last message of a role (of any, if none has it), says nothing."""
    if isinstance(text, str):
        return not text.strip()
    said = [message for message in text if message["role"] == role] or text
    return not text_in(said[-1]).strip() and not said[-1].get("tool_calls")


def _texts(messages: Messages) -> Iterator[str]:
    for message in messages:
        yield text_in(message)
        beside = (message.get(key) for key in SPOKEN if key != "content")
        yield from (value for value in beside if isinstance(value, str))


def claims_of(group: TextGroup) -> list[int]:
    """A number in [0, 2^63) for each thing that an example says: that a completion beats another one, or is
    desirable, or just follows the prompt. The opposite claim differs in the last bit alone."""
    prompt = _hash(
        group.prompt, xxhash.xxh3_64_intdigest(json.dumps(group.tools).encode()) if group.tools else 0
    )
    own = [_hash(completion, prompt) for completion in group.completions]
    if not group.edges:
        labels = group.labels or [1] * len(own)
        return [_claim(x, x, label > 0) for x, label in zip(own, labels, strict=True)]
    pairs = ((own[winner], own[loser]) for winner, loser, _ in group.edges)
    return [_claim(min(pair), max(pair), pair[0] < pair[1]) for pair in pairs]


def _claim(smaller: int, larger: int, beats: bool) -> int:
    """The claim that one of two texts, by their hashes, beats the other: the smaller one if `beats`."""
    return xxhash.xxh3_64_intdigest(larger.to_bytes(8), seed=smaller) >> 2 << 1 | beats


def _hash(text: Text, seed: int) -> int:
    content = text if isinstance(text, str) else json.dumps(text, sort_keys=True)
    return xxhash.xxh3_64_intdigest(content.encode(errors="surrogatepass"), seed=seed)
