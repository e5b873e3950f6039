"""The prompts of a data set of any layout, each once: what completions are sampled for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from madpo.trainer.config import DataConfig
from madpo.trainer.data.dataset import Source, open_source
from madpo.trainer.data.formats import Text, layout_of, parse_json_line, to_group
from madpo.trainer.data.tokenise import encode_prompt
from madpo.trainer.errors import UserError


@dataclass(frozen=True)
class Prompts:
    """The distinct prompts of a split in the order of the source."""

    source: str
    texts: list[Text] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # tokens of each
    rows: int = 0
    repeated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> rows


def read_prompts(
    data: DataConfig,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt_tokens: int | None = None,
    limit: int | None = None,
) -> Prompts:
    """The first `limit` distinct prompts of a split. Rows may hold nothing but a prompt.

    With `prompt_tokens` a plain text is cut behind its first so many tokens (BOS does not count), also one
    that has no prompt column. A prompt that fills `data.max_length` is left out and counted. Raises
    ValueError for a row that cannot be read (unless `on_bad_row: drop`) and where no prompt is left.
    """
    cache = Path(data.cache_dir).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "lock-prompts"):
        source = open_source(data, split, cache)
    found, seen = Prompts(source.name), set[str]()
    count = 0
    for number, row in _rows(source):
        if len(found.texts) == limit:
            break
        count += 1
        try:
            prompt = _prompt(row, tokenizer, prompt_tokens)
            length = len(encode_prompt(prompt, tokenizer))
        except Exception as error:  # a chat template, for one, raises what it likes
            if data.on_bad_row == "error":
                raise UserError(
                    f"{source.where(number)}: {error}; mend the row, or set data.on_bad_row=drop"
                ) from error
            found.dropped["unreadable"] += 1
            continue
        if not 0 < length < data.max_length:
            found.dropped["prompt fills max_length" if length else "prompt has no tokens"] += 1
            continue
        key = json.dumps(prompt, sort_keys=True)
        if key in seen:
            continue
        seen.add(key)
        found.texts.append(prompt)
        found.lengths.append(length)
    repeated = count - len(found.texts) - sum(found.dropped.values())
    if not found.texts:
        raise UserError(f"{source.name}: no prompt in {count} rows: {dict(found.dropped)}")
    return Prompts(found.source, found.texts, found.lengths, count, repeated, found.dropped)


def _rows(source: Source) -> Iterator[tuple[int, Any]]:
    """(what a row is known by in messages, the row: a mapping, or a raw line of JSON)."""
    row: Any
    for index, row in enumerate(source.rows):
        yield (row["line"], row["raw"]) if source.unit == "line" else (index, row)


def _prompt(row: Any, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int | None) -> Text:
    fields = parse_json_line(row) if isinstance(row, bytes) else row
    prompt, text = _text_of(fields)
    if prompt_tokens is None:
        if text:
            raise UserError(
                "plain text has no prompt; set generate.prompt_tokens to take its first tokens for one"
            )
        return prompt
    if not isinstance(prompt, str):
        raise UserError("generate.prompt_tokens cuts plain text, and this is a conversation; set it to null")
    return _first_tokens(prompt + text, tokenizer, prompt_tokens)


def _text_of(row: dict[str, Any]) -> tuple[Text, str]:
    """The prompt; and for a row of plain text without one, that text."""
    columns = {name for name, value in row.items() if value is not None}
    if "prompt" in columns and not columns & {"chosen", "rejected", "completion", "messages"}:
        row = _with_a_completion(row["prompt"])
    group = to_group(row, layout_of(row))
    (text, *_) = group.completions
    return group.prompt, text if group.prompt == "" and isinstance(text, str) else ""


def _with_a_completion(prompt: Any) -> dict[str, Any]:
    """A row that holds nothing but a prompt, completed, so that one function reads all rows."""
    answer: Text = "any" if isinstance(prompt, str) else [{"role": "assistant", "content": "any"}]
    return {"prompt": prompt, "completion": answer}


def _first_tokens(text: str, tokenizer: PreTrainedTokenizerBase, count: int) -> str:
    """The text up to the end of its token number `count`; all of a shorter one."""
    try:
        encoded = tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
    except NotImplementedError:
        raise UserError(
            f"generate.prompt_tokens needs a fast tokenizer, which {type(tokenizer).__name__} is not"
        ) from None
    offsets: Any = encoded["offset_mapping"]
    return text[: offsets[count - 1][1]] if len(offsets) > count else text
