"""Chat templates within bounds: one that would loop for ever or fill the memory ends with an error.

A template comes with a model, and so from strangers. jinja2's sandbox keeps it from running code and bounds
single ranges; here each rendering has a bound on its time, looked at in every turn of a loop and in every
call, and each value one on its size, looked at before it is made where an operation could make it huge.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any

from jinja2 import Template, nodes
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

from madpo.trainer.errors import UserError

MOST_SECONDS = 10.0
"""Processor time of one rendering."""
BETWEEN_LOOKS = 32
"""Ticks from one look at the clock to the next, as looking takes longer than most operations."""
MOST_CHARACTERS = 100_000_000
MOST_ITEMS = 10_000_000
MOST_BITS = 100_000
"""Size of a text, of a list, and of a whole number."""
MOST_BYTES = 2_000_000_000
"""Size of all values of one rendering, some of which may be in memory together."""
WIDE = re.compile(r"\d{6,}|\*")
"""A width in a format that is longer than any column, or given by the data."""

_rendering = threading.local()


class TemplateLimitError(UserError):
    """A template that does not end, makes too much, or makes another text each time."""


@contextmanager
def within_bounds(template: str, name: str) -> Iterator[None]:
    """Bound the time of the rendering inside; `name` says in messages whose template it is.

    A template that has broken a bound once is refused from then on, since the next row would take as long.
    """
    environment: Any = bounded(template).environment
    if environment.refused:
        raise TemplateLimitError(environment.refused)
    _rendering.end, _rendering.made = time.thread_time() + MOST_SECONDS, 0
    try:
        yield
    except TemplateLimitError as error:
        environment.refused = f"the chat template of {name} {error}; mend it, or take another tokenizer"
        raise TemplateLimitError(environment.refused) from None
    finally:
        del _rendering.end, _rendering.made


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, with bounds. It compiles a template with a look at the clock in every loop."""

    intercepted_binops = frozenset({"*", "**", "%", "+", "-"})

    def __init__(self, like: Any) -> None:
        """`like` is transformers' environment, whose options, filters and functions count here too."""
        kinds = [type(extension) for extension in like.extensions.values()]
        self.refused: str | None = None  # why
        self._ticks = 0
        super().__init__(trim_blocks=like.trim_blocks, lstrip_blocks=like.lstrip_blocks, extensions=kinds)
        self.globals.update(like.globals)
        del self.globals["lipsum"]  # text by the metre, which no conversation needs
        self.filters.update({name: self._bounded_filter(name, f) for name, f in like.filters.items()})
        self.filters["random"] = _refuse_to_draw

    @property
    def tick(self) -> str:
        """Nothing; raises TemplateLimitError if the rendering has had its time.

        A property, since a template calls a function within the sandbox, which takes as long as ten turns of
        a loop.
        """
        self._ticks += 1
        if self._ticks % BETWEEN_LOOKS == 0 and time.thread_time() > getattr(_rendering, "end", float("inf")):
            raise TemplateLimitError(f"takes more than {MOST_SECONDS:g} s for one conversation")
        return ""

    def joined(self, *values: Any) -> str:
        """What `~` makes of values."""
        return self.concat(map(str, values))

    def counted(self, value: Any) -> Any:
        """A value that was made, if the rendering may have one more of its size."""
        return _counted(value)

    def nested(self, value: Any) -> Any:
        """A list or table that was made, if it is not too large with all that is in it written out.

        It may hold a value twice, and the next one that value twice: sixty of them are a text without end.
        """
        _check(_written_out(value, {}), MOST_ITEMS)
        return value

    def concat(self, pieces: Iterable[str]) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        kept, size = [], 0
        for piece in pieces:
            kept.append(piece)
            size += len(piece)
            if size > MOST_CHARACTERS:
                _check(size, MOST_CHARACTERS)
        return "".join(kept)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _ = __self.tick
        owner = getattr(__obj, "__self__", None)
        _check_call(getattr(__obj, "__name__", ""), (owner, *args), kwargs)
        made = _counted(super().call(__context, __obj, *args, **kwargs))
        return __self.nested(made) if isinstance(made, dict | list | tuple) else made

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for factor, other in ((left, right), (right, left)):
                if isinstance(factor, int) and isinstance(other, str | list | tuple):
                    _check(len(other) * factor, _most(other))
        if isinstance(left, int) and isinstance(right, int) and operator in ("*", "**"):
            bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * right
            _check(bits, MOST_BITS)
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        made = _counted(super().call_binop(context, operator, left, right))
        if isinstance(made, set):  # of the keys of a table
            raise TemplateLimitError("makes a set, whose order is another one at every start")
        return self.nested(made) if isinstance(made, list | tuple) else made

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _WithTicks().visit(super()._parse(source, name, filename)).set_environment(self)

    def _bounded_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            _ = self.tick
            _check_call(name, args, kwargs)
            made = _counted(function(*args, **kwargs))
            return self.nested(made) if name == "list" else made

        return bounded


def _refuse_to_draw(*_: Any) -> Any:
    raise TemplateLimitError("draws at random, so that every start would train on other tokens")


class _WithTicks(NodeTransformer):
    """Puts the environment's `tick`, and calls of its `joined`, `counted` and `nested`, into a template."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        tick = nodes.EnvironmentAttribute("tick", lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _call("joined", node.nodes, node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _call("counted", [node], node) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        return self._made(node, node.items)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        return node if node.ctx == "store" else self._made(node, node.items)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        return self._made(node, [pair.value for pair in node.items])

    def _made(self, node: nodes.Expr, items: list[nodes.Expr]) -> nodes.Expr:
        self.generic_visit(node)
        is_constant = all(isinstance(item, nodes.Const) for item in items)
        return node if is_constant else _call("nested", [node], node)


def _call(method: str, arguments: list[Any], beside: nodes.Node) -> nodes.Call:
    function = nodes.EnvironmentAttribute(method, lineno=beside.lineno)
    return nodes.Call(function, arguments, [], None, None, lineno=beside.lineno)


def _check_call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise TemplateLimitError for a call that could make a huge value at one stroke."""
    if name not in GROWING:
        return
    values = [*args, *kwargs.values()]
    widths = [abs(value) for value in values if isinstance(value, int)]
    texts = [value for value in values if isinstance(value, str)]
    lists = [value for value in values if isinstance(value, list | tuple)]
    _check(max(widths, default=0), MAX_RANGE)
    if name in ("indent", "expandtabs", "wordwrap", "urlize"):  # some take a text for what is put between
        between = max([*widths, *map(len, texts[1:])], default=0)
        _check(between * max(map(len, texts), default=0), MOST_CHARACTERS)
    if name == "replace" and len(texts) > 2:
        text, old, new = texts[:3]
        _check(text.count(old) * len(new), MOST_CHARACTERS)
    if name == "join" and lists:
        own = sum(len(item) for item in lists[0] if isinstance(item, str))
        _check(own + len(lists[0]) * max(map(len, texts), default=0), MOST_CHARACTERS)
    if name == "format" and texts:
        _check_format(texts[0])


GROWING = {
    *("center", "ljust", "rjust", "zfill", "expandtabs", "replace", "join", "format"),  # of texts
    *("indent", "wordwrap", "urlize", "tojson", "batch", "slice", "truncate", "round"),  # filters
}
"""Methods and filters whose result may be far larger than what they are given."""


def _check_format(text: str) -> None:
    if WIDE.search(text) and ("{" in text or "%" in text):
        raise TemplateLimitError("formats a text to a width without bounds")


def _counted(value: Any) -> Any:
    if isinstance(value, str | list | tuple | dict):
        _check(len(value), _most(value))
        _rendering.made = getattr(_rendering, "made", 0) + len(value) * (1 if isinstance(value, str) else 8)
        if _rendering.made > MOST_BYTES:
            raise TemplateLimitError(f"makes values of more than {MOST_BYTES:,} bytes for one conversation")
    return value


def _written_out(value: Any, known: dict[int, int]) -> int:
    """The number of values in a list or a table, and in those inside; `known` are those of objects by id."""
    if id(value) not in known:
        children = value.values() if isinstance(value, dict) else value
        inside = (child for child in children if isinstance(child, dict | list | tuple))
        known[id(value)] = len(value) + sum(_written_out(child, known) for child in inside)
    return known[id(value)]


def _most(value: Any) -> int:
    return MOST_CHARACTERS if isinstance(value, str) else MOST_ITEMS


def _check(size: int, most: int) -> None:
    if size > most:
        raise TemplateLimitError(f"makes a value of size {size:,}, and {most:,} is the most")


@lru_cache
def bounded(template: str) -> Template:
    """A chat template, compiled with bounds, in place of transformers' own function for that."""
    return BoundedEnvironment(_TRANSFORMERS("").environment).from_string(template)


_TRANSFORMERS: Any = chat_template_utils._compile_jinja_template
chat_template_utils._compile_jinja_template = bounded
