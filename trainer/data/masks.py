"""Which tokens of a conversation its assistant said: those are scored, and the others are context.

Nothing is known of the template. What a message says is found by rendering the conversation again with other
texts in that one message: behind it, both renderings are the same. Two more renderings say what the template
writes between messages: what follows an answer when nothing else does is the answer's own end, and the
generation prompt behind the message before it is its header. Both are looked for where the message stands,
so it does not matter if a template writes earlier messages otherwise once others follow. Where it ends a turn
otherwise in the middle, that end is what stands between the answer and the next generation prompt.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from madpo.trainer.data.chat_template import translated, write
from madpo.trainer.data.template_shape import MARK, ODD, THOUGHT, common_prefix, probes
from madpo.trainer.data.translations import Conversation, translate
from madpo.trainer.errors import UserError, on_one_line
from madpo.trainer.formats.chat_message import WEIGHT, Messages

TrainOn = Literal["assistant", "all"]


def scored_messages(messages: Messages, first: int, train_on: TrainOn) -> list[int]:
    """The messages, by index, whose tokens are scored, if the completion begins with message `first`."""
    return [
        index
        for index, message in enumerate(messages[first:], first)
        if message.get(WEIGHT) != 0 and (train_on == "all" or message["role"] == "assistant")
    ]


def is_whole(completion: Messages, train_on: TrainOn) -> bool:
    """Whether every token of a completion is scored, so that it needs no mask."""
    is_one_turn = train_on == "all" or len(completion) == 1
    return is_one_turn and len(scored_messages(completion, 0, train_on)) == len(completion)


def mask_of(
    messages: Messages,
    first: int,  # index of the completion's first message
    begun: str,  # the beginning of that message's text, if the prompt has it, or nothing
    train_on: TrainOn,
    tokenizer: PreTrainedTokenizerBase,
    options: dict[str, Any],  # of `apply_chat_template`
) -> list[bool]:
    """Whether each token of a conversation is scored; none before message `first` is.

    A token belongs to the message that its last character belongs to. The header of an answer belongs to no
    message, its end of turn to the answer. Raises UserError if a template writes the messages in a way that
    does not show where one ends.
    """
    if not tokenizer.is_fast:  # it gives no places of tokens in the text
        raise UserError(
            f"a completion of several messages needs a fast tokenizer, which {type(tokenizer).__name__} is "
            "not; set data.train_on=all to score all of it"
        )
    parted = [_parted(messages[first], len(begun))] if begun else []
    messages, options, rendering = translated(messages, tokenizer, options)
    parted = translate(Conversation(parted), rendering.translations).messages
    turns = _Turns(messages, first, parted, lambda x, **more: write(x, tokenizer, {**options, **more}))
    encoded: Any = tokenizer(turns.text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    scored = scored_messages(messages, first, train_on)
    mask = [False] * len(ends)
    for index in scored:
        try:
            start, end = turns.span(index, with_header=train_on == "all")
        except UserError:
            raise
        except Exception as error:  # a template may raise anything, also for the conversation's beginning
            raise turns.hidden(index, f", as it refuses a part of them ({on_one_line(error)})") from error
        tokens = slice(bisect_left(ends, start + 1), bisect_left(ends, end + 1))
        mask[tokens] = [True] * len(mask[tokens])
    return mask


def _parted(message: dict[str, Any], place: int) -> dict[str, Any]:
    """The message with another letter at this place of its text, where the prompt ends."""
    text = message["content"]
    return {**message, "content": f"{text[:place]}{ODD}{text[place:]}"}


class _Turns:
    """Where the messages of a conversation stand in its text.

    `parted` holds message `first` with another letter where its beginning ends, if the prompt has that.
    """

    def __init__(self, messages: Messages, first: int, parted: Messages, write: Callable[..., str]) -> None:
        self._messages, self._first, self._parted, self._write = messages, first, parted, write
        self.text = write(messages)
        self._found = dict[int, tuple[dict[str, Any], int]]()  # what `_other_words` gives of each message

    def span(self, index: int, with_header: bool) -> tuple[int, int]:
        """The place in the text of what a message says, with its end of turn, and with its header except for
        the first of the completion. Raises UserError where that does not show."""
        is_bare = not with_header or index == self._first
        is_answer = self._messages[index]["role"] == "assistant"
        start = self._after_header(index) if is_bare and is_answer else self._end(index - 1)
        end = self._end(index)
        if start > end:
            raise self.hidden(index)
        return start, end

    def _end(self, index: int) -> int:
        """Where a message ends: after what the template writes behind it when it is the last."""
        if index == len(self._messages) - 1:
            return len(self.text)
        if index < 0:
            return 0
        behind, closing = self._behind(index), self._tail(index, self._write)
        shared = common_prefix(self.text[behind:], closing)
        if closing and not shared:
            raise self.hidden(index)
        if not closing:  # it ends a turn only where another follows
            return behind + self._before_next(index)
        if shared < len(closing):  # it ends a turn otherwise where another follows
            within = self._tail_within(index)
            shared = len(within) if within and self.text.startswith(within, behind) else shared
        return behind + shared

    def _before_next(self, index: int) -> int:
        """The number of characters between a message and the header of the next one, which is what stands
        before its words where it is alone; 0 for blanks, which belong to neither."""
        behind, following = self._behind(index), self._messages[index + 1]
        try:
            alone = [self._write([message], bos_token="") for message in _plain(following["role"])]
        except Exception:  # a template may raise anything, and this may be no message to begin with
            return 0
        header = alone[0][: common_prefix(*alone)]
        between = self._before_words(index + 1)[behind:]
        closing = between[: len(between) - _common_suffix(between, header)]
        return len(closing) if closing.strip() and self.text.startswith(between, behind) else 0

    def _before_words(self, index: int) -> str:
        """The text up to the words of a plain message in this place."""
        one, other = (self._with(index, message) for message in _plain(self._messages[index]["role"]))
        return one[: common_prefix(one, other)]

    def _tail_within(self, index: int) -> str:
        """What is written behind a message when the assistant is to speak next, without its header."""
        opened = partial(self._write, add_generation_prompt=True)
        try:
            text = self._tail(index, opened)
        except Exception:  # a template may raise anything, and this may be no place for an answer
            return ""
        header = self._header
        return text.removesuffix(header) if header and text.endswith(header) else ""

    @cached_property
    def _header(self) -> str:
        """What the generation prompt adds behind the words of the first one who is not the assistant."""
        roles = [message["role"] for message in self._messages]
        before = self._messages[: roles.index("assistant")] if "assistant" in roles else []
        if not before:
            return ""
        try:
            closed, opened = self._write(before), self._write(before, add_generation_prompt=True)
        except Exception:  # a template may raise anything
            return ""
        return opened[len(closed) :] if opened.startswith(closed) else ""

    def _after_header(self, index: int) -> int:
        """Where the words of an answer begin: after the generation prompt behind the message before it."""
        if index == self._first and self._parted:
            return common_prefix(self.text, self._with(index, self._parted[0]))
        before = self._messages[:index]
        opened = partial(self._write, add_generation_prompt=True)
        behind, expected = 0, opened(before)
        if before:
            behind, expected = self._behind(index - 1), self._tail(index - 1, opened)
        shared = common_prefix(self.text[behind:], expected)
        if shared == len(expected):
            # Where no header is wanted, as behind the result of a tool, the template may still write one.
            start = behind + shared
            is_header = self._header and self.text.startswith(self._header, start)
            return start + len(self._header) if is_header and not expected.endswith(self._header) else start
        # Another answer in this place shows what stands before the words of any.
        until = self._before_words(index)
        if self._header and until.endswith(self._header) and self.text.startswith(until):
            return len(until)  # more stands before the header here than the generation prompt has there
        # The generation prompt says more than the header does here, as it may open the thinking.
        closed, opening = self._write(before), opened(before)
        header = len(opening) - len(closed) if opening.startswith(closed) else 0
        shared = min(shared, common_prefix(until[behind:], expected))
        is_header = shared in (len(until) - behind, len(expected)) or THOUGHT.search(expected[:shared])
        if not is_header or not until.startswith(self.text[:behind]) or shared <= len(expected) - header:
            raise self.hidden(index)
        return behind + shared

    def _behind(self, index: int) -> int:
        """The place behind the words of a message: from there on, the text is the same with other words."""
        return self._other_words(index)[1]

    def _other_words(self, index: int) -> tuple[dict[str, Any], int]:
        """The message with other words, such that the text is another; and the place behind its own."""
        if index not in self._found:
            for message in probes(self._messages[index]):
                try:
                    text = self._with(index, message)
                except Exception:  # a template may raise anything, and need not know a message like this
                    continue
                if text != self.text:
                    self._found[index] = message, len(self.text) - _common_suffix(self.text, text)
                    break
            else:
                raise self.hidden(index)
        return self._found[index]

    def _tail(self, index: int, write: Callable[[Messages], str]) -> str:
        """What is written behind a message when it is the last."""
        *before, last = self._messages[: index + 1]
        text = write([*before, last])
        return text[len(text) - _common_suffix(text, write([*before, self._other_words(index)[0]])) :]

    def _with(self, index: int, message: dict[str, Any]) -> str:
        """The text with another message in this place."""
        return self._write([*self._messages[:index], message, *self._messages[index + 1 :]])

    def hidden(self, index: int, why: str = "") -> UserError:
        """The error for a message whose place does not show."""
        return UserError(
            f"the chat template does not show which tokens are those of message {index + 1} "
            f"(role {self._messages[index]['role']}){why}; set data.train_on=all to score everything, or "
            "take another template (model.tokenizer_name_or_path)"
        )


def _plain(role: str) -> list[dict[str, Any]]:
    """Two messages of a role whose words have nothing in common."""
    return [{"role": role, "content": content} for content in (MARK, ODD)]


def _common_suffix(one: str, other: str) -> int:
    most = min(len(one), len(other))
    return bisect_left(range(1, most + 1), True, key=lambda n: one[-n:] != other[-n:])
