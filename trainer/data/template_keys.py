"""What a chat template reads: the keys of messages, and its variables. Found in its syntax tree, since a name
that stands somewhere in its text may be that of something else."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from jinja2 import Environment, meta, nodes
from transformers.utils.chat_template_utils import _compile_jinja_template

from madpo.trainer.formats.text_groups import TextGroup

MESSAGES = "messages"

_WHOLE = {"tojson", "string", "items", "dictsort", "pprint", "values", "keys", "xmlattr"}
"""Filters and methods that take all keys of a message."""

_BY_KEY = {"selectattr", "rejectattr", "map", "groupby", "sort", "unique", "sum", "attr"}
"""Filters that name a key of a message."""


def unread(
    text: TextGroup, chat_template: str | dict[str, str] | None, variables: Iterable[str]
) -> list[str]:
    """What not even the chat template reads of a conversation, as text for the user: keys of messages, and
    these variables or the conversation's own."""
    if chat_template is None or not text.conversational:
        return []
    names = tuple(dict.fromkeys([*variables, *text.template_kwargs]))
    return [
        *(f"{key} (of messages)" for key in unread_keys(chat_template, text.unknown_keys)),
        *(f"{name} (of chat_template_kwargs)" for name in unread_variables(chat_template, names)),
    ]


def unread_keys(chat_template: str | dict[str, str], keys: tuple[str, ...]) -> list[str]:
    """Those of these keys of messages that no template of a tokenizer reads."""
    read = [_keys_of_messages(template) for template in _each(chat_template)]
    return [key for key in keys if not any(known is None or key in known for known in read)]


def unread_variables(chat_template: str | dict[str, str], names: tuple[str, ...]) -> list[str]:
    """Those of these variables that no template of a tokenizer reads."""
    read = frozenset().union(*map(_variables, _each(chat_template)))
    return [name for name in names if name not in read]


def _each(chat_template: str | dict[str, str]) -> list[str]:
    return [chat_template] if isinstance(chat_template, str) else list(chat_template.values())


@lru_cache(maxsize=100)
def _variables(template: str) -> frozenset[str]:
    return frozenset(meta.find_undeclared_variables(_tree(template)))


@lru_cache(maxsize=100)
def _keys_of_messages(template: str) -> frozenset[str] | None:
    """The keys that a template reads of messages; None if it takes messages as a whole, with all keys."""
    tree = _tree(template)
    names = _names_of_messages(tree)
    read = set[str]()
    for node in tree.find_all(nodes.Node):
        match node:
            case nodes.Getattr(node=of, attr=key) if _may_be(of, names):
                if key in _WHOLE:
                    return None
                read.add(key)
            case nodes.Getitem(node=of, arg=nodes.Const(value=str(key))) if _may_be(of, names):
                read.add(key)
            case nodes.Call(node=nodes.Getattr(node=of, attr="get"), args=[nodes.Const(value=key), *_]) if (
                _may_be(of, names)
            ):
                read.add(key)
            case nodes.Compare(expr=nodes.Const(value=str(key)), ops=ops) if any(
                _may_be(operand.expr, names) for operand in ops
            ):
                read.add(key)
            case nodes.Filter(node=of, name=name, args=args, kwargs=kwargs) if _may_be(of, names):
                if name in _WHOLE:
                    return None
                given = [*args, *(x.value for x in kwargs)] if name in _BY_KEY else []
                read |= {x.value for x in given if isinstance(x, nodes.Const)}
            case nodes.Output(nodes=written) if any(_may_be(x, names) for x in written):
                return None
            case _:
                pass
    return frozenset(read)


def _tree(template: str) -> nodes.Template:
    environment: Any = _compile_jinja_template(template).environment
    # As jinja2 parses: the bounds on templates are put into the tree, in place of some of its nodes.
    return Environment._parse(environment, template, None, None)


def _names_of_messages(tree: nodes.Template) -> frozenset[str]:
    """The variables that may hold the messages or one of them."""
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    bound: list[tuple[Any, Any]] = [(x.target, x.iter) for x in tree.find_all(nodes.For)]
    bound += [(x.target, x.node) for x in tree.find_all(nodes.Assign)]
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name in macros:
            parameters = macros[call.node.name].args
            bound += zip(parameters, call.args, strict=False)
            named = {parameter.name: parameter for parameter in parameters}
            bound += [(named[x.key], x.value) for x in call.kwargs if x.key in named]
    names = frozenset({MESSAGES})
    while True:
        more = {_name(target) for target, value in bound if _may_be(value, names)} - {""}
        if more <= names:
            return names
        names |= more


def _name(node: Any) -> str:
    """What a variable or an attribute of a namespace is called; nothing for all else."""
    match node:
        case nodes.Name(name=name):
            return name
        case nodes.NSRef(name=name, attr=attr) | nodes.Getattr(node=nodes.Name(name=name), attr=attr):
            return f"{name}.{attr}"
        case _:
            return ""


def _may_be(node: Any, names: frozenset[str]) -> bool:
    """Whether an expression may be the messages, some of them, or one of them."""
    if _name(node) in names:
        return True
    match node:
        case nodes.Getitem(node=of, arg=arg):
            return _may_be(of, names) and not (isinstance(arg, nodes.Const) and isinstance(arg.value, str))
        case nodes.Getattr(node=nodes.Name(name="loop"), attr=attr):
            return attr in ("previtem", "nextitem")
        case nodes.Filter(node=of, name=name):
            return of is not None and name not in ("length", "count", "map", *_WHOLE) and _may_be(of, names)
        case nodes.CondExpr(expr1=one, expr2=other):
            return _may_be(one, names) or _may_be(other, names)
        case nodes.Add(left=one, right=other) | nodes.Or(left=one, right=other):
            return _may_be(one, names) or _may_be(other, names)
        case _:
            return False
