"""The distinct prompts of a data set of any layout, to sample completions for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from madpo.trainer.config.data import DataConfig
from madpo.trainer.counted import counted
from madpo.trainer.data.report import MOST_PLACES, UNREADABLE
from madpo.trainer.data.source import cache_folder, fields_of, open_source
from madpo.trainer.data.template_keys import unread
from madpo.trainer.data.tokenise import FILLS, TokenRules, encode_prompt, is_continued
from madpo.trainer.data.tokenised_cache import adapter_in, rules_of
from madpo.trainer.errors import UserError
from madpo.trainer.formats.adapters import ADAPTERS
from madpo.trainer.formats.chat_message import text_in, without_weights
from madpo.trainer.formats.numbers import LABELS
from madpo.trainer.formats.read_row import RowRules, bytes_as_text, choose_adapter, read_row, renamed
from madpo.trainer.formats.text_groups import Text, TextGroup


@dataclass(frozen=True)
class Prompts:
    """The distinct prompts of a split in the order of the source."""

    source: str
    rules: TokenRules
    groups: list[TextGroup] = field(default_factory=list)  # without completions
    lengths: list[int] = field(default_factory=list)  # tokens of each prompt
    places: list[str] = field(default_factory=list)  # how messages name the example of each prompt
    rows: int = 0  # examples read
    repeated: int = 0  # examples whose prompt an earlier one has
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> examples
    notes: Counter[str] = field(default_factory=Counter)  # what the chat template made of prompts -> how many
    unused: Counter[str] = field(default_factory=Counter)  # columns that nothing looks at -> examples
    where: dict[str, list[str]] = field(default_factory=dict)  # what is counted -> the first examples of it

    @property
    def texts(self) -> list[Text]:
        return [group.prompt for group in self.groups]

    @property
    def keys(self) -> list[str]:
        """A key for each prompt, equal for equal ones."""
        return [_key(group) for group in self.groups]

    def count(self, kind: Counter[str], texts: Iterable[str], place: str) -> None:
        """Count these texts, which are said of the example of this place."""
        for text in texts:
            kind[text] += 1
            if kind[text] <= MOST_PLACES:
                self.where.setdefault(text, []).append(place)

    def encode(self, member: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The tokens of prompt number `member`."""
        return encode_prompt(self.groups[member], tokenizer, self.rules)[0]


def read_prompts(
    data: DataConfig,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt_tokens: int | None = None,
    limit: int | None = None,
) -> Prompts:
    """The first `limit` distinct prompts of a split. An example may hold nothing but a prompt.

    With `prompt_tokens`, the prompt is that many first tokens (without BOS) of the prompt's text, or of plain
    text without a prompt. A prompt that fills `data.max_length` is dropped and counted. Raises UserError for
    an example that cannot be read (unless `on_bad_row: drop`), and if no prompt is left.
    """
    if data.datasets is not None or data.streaming:
        raise UserError(
            "data: generate reads one data set, not streamed; set dataset_name and streaming=false"
        )
    if data.folds is not None:
        raise UserError("data.folds: generate takes the prompts of all folds; remove folds and fold")
    cache = cache_folder(data)
    with FileLock(cache / "lock-prompts"):
        source = open_source(data, split, cache)
    rules = rules_of(data)
    adapter = adapter_in(source, rules, _choose)
    prompts, seen = Prompts(source.name, rules), set[str]()
    count, classes = 0, source.classes
    template: Any = tokenizer.chat_template  # text, or several by name
    for number, row in source.examples():
        if len(prompts.groups) == limit:
            break
        count, place = count + 1, source.where(number)
        try:
            group = _prompt(fields_of(row, source.unit, classes), adapter, tokenizer, rules, prompt_tokens)
            tokens, notes = encode_prompt(group, tokenizer, rules)
        except Exception as error:  # a chat template may raise anything
            if data.on_bad_row == "error":
                raise UserError(f"{place}: {error}; mend the row, or set data.on_bad_row=drop") from error
            prompts.count(prompts.dropped, [UNREADABLE], place)
            continue
        length = len(tokens)
        if not 0 < length < data.max_length:
            prompts.count(prompts.dropped, [FILLS if length else "prompt has no tokens"], place)
            continue
        prompts.count(prompts.unused, [*group.unused, *unread(group, template, rules.template_kwargs)], place)
        key = _key(group)
        if key in seen:
            continue
        seen.add(key)
        prompts.groups.append(group)
        prompts.lengths.append(length)
        prompts.count(prompts.notes, notes, place)
        prompts.places.append(place)
    repeated = count - len(prompts.groups) - sum(prompts.dropped.values())
    if not prompts.groups:
        reasons = ", ".join(f"{number}: {reason}" for reason, number in prompts.dropped.items())
        raise UserError(f"{source.name}: no prompt in {counted(count, 'row')} ({reasons})")
    return replace(prompts, rows=count, repeated=repeated)


def _prompt(
    fields: dict[str, Any],
    adapter: str,
    tokenizer: PreTrainedTokenizerBase,
    rules: TokenRules,
    prompt_tokens: int | None,
) -> TextGroup:
    group = _group(fields, adapter, rules.rows)
    text = group.completions[0] if group.completions else ""  # empty if no completion has a score
    asked = [] if isinstance(text, str) else list(takewhile(lambda x: x["role"] != "assistant", text))
    prompt = group.prompt if isinstance(group.prompt, str) else group.prompt + without_weights(asked)
    bare = replace(group, prompt=prompt, completions=[], edges=[], labels=[])
    is_plain = group.prompt == "" and isinstance(text, str)
    if prompt_tokens is None:
        if is_plain:
            raise UserError(
                "plain text has no prompt; set generate.prompt_tokens to take its first tokens for one"
            )
        _check_written(bare)
        return bare
    if not isinstance(group.prompt, str):
        raise UserError("generate.prompt_tokens cuts plain text, and this is a conversation; set it to null")
    whole = text if is_plain else group.prompt
    assert isinstance(whole, str)
    return replace(bare, prompt=_first_tokens(whole, tokenizer, prompt_tokens, rules))


def _check_written(group: TextGroup) -> None:
    """Raise UserError for a prompt after which an answer is sampled that would be read as the end of another
    one, once both stand in columns of their own."""
    if group.conversational and is_continued(replace(group, whole=False)) != is_continued(group):
        last: Any = group.prompt[-1]
        raise UserError(
            "the assistant answers twice in a row, and a prompt that ends with its words is continued, got "
            f"{text_in(last)!r:.60} before the last answer; join the two, or put a message between them"
        )


PROMPT_ONLY = "prompt"


def _choose(columns: Iterable[str], rules: RowRules, supervised: bool) -> str:
    """The adapter for these columns, or PROMPT_ONLY. Raises UserError if none fits."""
    names = renamed(dict.fromkeys(columns), rules.columns)
    return PROMPT_ONLY if _is_prompt_only(names, rules) else choose_adapter(columns, rules, supervised)


def _is_prompt_only(names: Iterable[str], rules: RowRules) -> bool:
    names = set(names)
    answers = {"chosen", "rejected", "completion", "completions", "messages"}
    return rules.adapter == "auto" and "prompt" in names and not names & answers


def _group(row: dict[str, Any], adapter: str, rules: RowRules) -> TextGroup:
    """The example's group, whatever the label of its completion. One that holds nothing but a prompt gets a
    dummy completion, so that `read_row` takes it too."""
    needed = ADAPTERS[adapter].uses if adapter != PROMPT_ONLY else ()
    given = {name: value for name, value in row.items() if name not in LABELS or name in needed}
    row = bytes_as_text(given)
    columns = {name: value for name, value in renamed(row, rules.columns).items() if value is not None}
    if adapter != PROMPT_ONLY and not _is_prompt_only(columns, rules):
        return read_row(row, ADAPTERS[adapter], rules)
    prompt = columns.get("prompt")
    answer: Text = "any" if isinstance(prompt, str) else [{"role": "assistant", "content": "any"}]
    return read_row({**row, "completion": answer}, ADAPTERS["prompt-completion"], rules)


def _key(group: TextGroup) -> str:
    return json.dumps((group.prompt, group.tools, group.template_kwargs), sort_keys=True)


def _first_tokens(text: str, tokenizer: PreTrainedTokenizerBase, count: int, rules: TokenRules) -> str:
    """The text of the first `count` tokens; all of it if there are no more."""
    if not tokenizer.is_fast:  # it gives no places of tokens in the text
        raise UserError(
            f"generate.prompt_tokens needs a fast tokenizer, which {type(tokenizer).__name__} is not"
        )
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=not rules.text_holds_special_tokens,
        return_offsets_mapping=True,
    )
    offsets: Any = encoded["offset_mapping"]
    return text[: offsets[count - 1][1]] if len(offsets) > count else text
