"""The messages for a config that does not fit the schema."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from madpo.trainer.errors import nearest
from madpo.trainer.objectives.registry import OBJECTIVES


def explain(error: ValidationError, schema: type[BaseModel]) -> str:
    """The message for a validation error: each problem on a line, with key, fault and what is allowed."""
    lines = [_explain_one(item, schema) for item in error.errors()]
    return lines[0] if len(lines) == 1 else f"{len(lines)} problems\n" + "\n".join(f"  {x}" for x in lines)


def _explain_one(item: Any, schema: type[BaseModel]) -> str:
    location = [str(part) for part in item["loc"]]
    if location[:1] == ["objective"] and location[1:2] and location[1] in OBJECTIVES:
        del location[1]  # pydantic puts the parameter class into the path
    key, kind, value = ".".join(location), item["type"], item["input"]
    prefix = f"{key}: " if key else ""
    if kind == "extra_forbidden":
        return f"{prefix}unknown key{nearest(location[-1], _known_keys(item['loc'], schema))}"
    if kind == "missing":
        return f"{prefix}is required"
    if kind == "union_tag_not_found":
        return f"{prefix}loss_type is required; one of {', '.join(OBJECTIVES)}"
    if kind == "union_tag_invalid":
        tag = str(item["ctx"]["tag"])
        if tag in OBJECTIVES:
            return (
                f"objective.loss_type: {tag!r} was registered after the first config had been read; register "
                "objectives earlier (in a notebook: restart the kernel)"
            )
        return f"objective.loss_type: unknown objective {tag!r}{nearest(tag, OBJECTIVES)}"
    if kind == "value_error" and (not key or isinstance(value, dict | BaseModel)):
        return prefix + item["msg"].removeprefix("Value error, ")
    return f"{prefix}{item['msg'].removeprefix('Value error, ')} (got {value!r})"


def _known_keys(location: tuple[Any, ...], schema: type[BaseModel]) -> list[str]:
    """The keys that are allowed where `location` points to an unknown one."""
    node = schema
    parents = [part for part in location[:-1] if isinstance(part, str)]  # without indices of lists
    if parents[:1] == ["objective"]:
        node = OBJECTIVES[parents[1]].params
    else:
        for parent in parents:
            node = section_in(node.model_fields[parent].annotation)
    return [field.serialization_alias or name for name, field in node.model_fields.items()]


def section_in(annotation: Any) -> type[BaseModel]:
    """The section in a field's type, which may be a list of sections, or allow null."""
    while not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    return annotation
