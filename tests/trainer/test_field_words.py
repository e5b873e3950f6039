"""The values of a field in words, for the list of keys and for errors."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError, create_model

from madpo.trainer.field_words import choices_of, problem_of, values_of
from madpo.trainer.objectives.fields import Lambda, ProbabilityThreshold, Threshold


class Inner(BaseModel):
    x: int


class Device(StrEnum):
    CPU = "cpu"
    NONE = "none"


def field(annotation: Any, **options: Any) -> Any:
    return create_model("Model", key=(annotation, Field(**options))).model_fields["key"]


@pytest.mark.parametrize(
    "annotation, options, words",
    [
        (bool, {}, "true or false"),
        (int, {"ge": 1}, "a whole number of at least 1"),
        (int | None, {"ge": 0, "lt": 5}, "a whole number of at least 0 and below 5 or null"),
        (float, {"gt": 0, "le": 1}, "a number above 0 and at most 1"),
        (Annotated[Lambda, Field(gt=0, lt=1)], {}, "a number above 0 and below 1"),
        (str, {"examples": ["5GB", "1MB"]}, "text, as in 5GB or 1MB"),
        (bool | Literal["selective"], {}, "true, false or selective"),
        (Annotated[int, Field(ge=1)] | Literal["auto"], {}, "a whole number of at least 1 or auto"),
        (list[str], {}, "a list of texts"),
        (list[Inner] | None, {"min_length": 1}, "a list of one or more sections or null"),
        (list[Annotated[float, Field(ge=0)]], {}, "a list of numbers"),
        (dict[str, Any], {}, "a mapping"),
        (Device | None, {}, "cpu, none or null"),
        (Inner, {}, "a section"),
        (Threshold, {}, "a number, or quantile:q with q between 0 and 1, as in quantile:0.1"),
    ],
)
def test_what_a_field_takes(annotation, options, words):
    assert values_of(field(annotation, **options)) == words


def test_choices_are_the_words_that_a_field_takes():
    assert choices_of(field(bool | Literal["selective", "all"] | None)) == ["selective", "all"]
    assert choices_of(field(str)) == []


@pytest.mark.parametrize(
    "annotation, value, problem",
    [
        (bool, "yes", "expected true or false, got 'yes'"),
        (float, True, "expected a number, got true"),
        (int, None, "expected a whole number, got null"),
        (
            ProbabilityThreshold,
            2.0,
            "expected a number above 0 and below 1, or quantile:q with q between 0 and 1, as in "
            "quantile:0.1, got 2.0",
        ),
    ],
)
def test_what_is_wrong_with_a_value(annotation, value, problem):
    model: Any = create_model("Model", __config__={"strict": True}, key=(annotation, ...))
    with pytest.raises(ValidationError) as caught:
        model(key=value)
    assert problem_of(caught.value.errors()[0], model.model_fields["key"]) == problem
