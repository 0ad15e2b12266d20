"""Prompts: what a template may hold, how values get in, and how two versions are compared."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.failures import InvalidModelStateError, InvalidRequestError
from governance.prompts import MAX_RENDERED, check_prompt, diff, render

TEXT = {"type": "string"}


def prompt(template: str, **variables: Any) -> dict[str, Any]:
    return {"template": template, "variables": variables}


@pytest.mark.parametrize(
    ("content", "pointers"),
    [
        (prompt("Hello"), []),
        (prompt("Hello {{name}}, {{name}}", name=TEXT), []),
        (prompt('Answer {"a": {"b": 1}} with {{name}}', name=TEXT), []),
        (prompt("{{a}}{{b}}", a=TEXT, b=TEXT), []),
        (prompt("Hello {{name}}"), ["/template"]),
        (prompt("Hello", name=TEXT), ["/variables/name"]),
        (prompt("{{other}}", name=TEXT), ["/template", "/variables/name"]),
        (prompt("{{ name }}", name=TEXT), ["/template", "/variables/name"]),
        (prompt("{{name|upper}} {{name}}", name=TEXT), ["/template"]),
        (prompt("{{name.x}} {{name}}", name=TEXT), ["/template"]),
        (prompt("{{{name}}}", name=TEXT), ["/template"]),
        (prompt("{{{{name}}}}", name=TEXT), ["/template"]),
        (prompt("{{", name=TEXT), ["/template", "/variables/name"]),
        (prompt("{{name}}", name={"type": "code"}), ["/variables/name/type"]),
        (prompt("{{name}}", name={"type": "string", "max_length": 0}), ["/variables/name/max_length"]),
        (prompt(""), ["/template"]),
        ({"template": 1}, ["/template"]),
        ({"template": "x", "code": "y"}, ["/code"]),
        ({"template": "x", "parameters": {"temperature": 0.2, "stop": None}, "model": "m"}, []),
        ({}, ["/template"]),
    ],
)
def test_declared_variables_are_the_used_ones_and_a_placeholder_is_nothing_but_a_name(
    content: dict[str, Any], pointers: list[str]
) -> None:
    found = [pointer for pointer, _ in check_prompt(content)]
    assert found == pointers


def test_parameters_are_plain_values() -> None:
    found = check_prompt({"template": "x", "parameters": {"tools": ["shell"]}})
    assert found
    assert all(pointer.startswith("/parameters/tools") for pointer, _ in found)


@given(st.text(max_size=40))
def test_no_template_makes_the_check_raise(template: str) -> None:
    check_prompt(prompt(template, name=TEXT))


@given(st.text(max_size=60), st.text(max_size=60))
def test_a_value_is_put_in_as_it_is_and_never_read_as_a_template(first: str, second: str) -> None:
    content = prompt("<{{a}}|{{b}}>", a=TEXT, b=TEXT)
    assert render(content, {"a": first, "b": second}) == f"<{first}|{second}>"


def test_values_that_look_like_placeholders_stay_text() -> None:
    content = prompt("{{a}} {{b}}", a=TEXT, b=TEXT)
    assert render(content, {"a": "{{b}}", "b": r"\1 \g<1> {{a}}"}) == r"{{b}} \1 \g<1> {{a}}"


def test_every_type_has_one_text() -> None:
    content = prompt(
        "{{t}} {{i}} {{n}} {{m}} {{b}}[{{o}}]",
        t=TEXT,
        i={"type": "integer"},
        n={"type": "number"},
        m={"type": "number"},
        b={"type": "boolean"},
        o={"type": "string", "required": False},
    )
    assert render(content, {"t": "x", "i": 3, "n": 1.5, "m": 2, "b": True}) == "x 3 1.5 2 true[]"


@pytest.mark.parametrize(
    ("variable", "values", "reason"),
    [
        (TEXT, {}, "is required"),
        (TEXT, {"v": "x", "w": "y"}, "is not a variable"),
        (TEXT, {"v": 1}, "must be of type string"),
        (TEXT, {"v": None}, "must be of type string"),
        ({"type": "string", "max_length": 3}, {"v": "abcd"}, "longer than 3"),
        ({"type": "integer"}, {"v": 1.0}, "must be of type integer"),
        ({"type": "integer"}, {"v": True}, "must be of type integer"),
        ({"type": "integer", "max_length": 3}, {"v": 12_345}, "longer than 3"),
        ({"type": "number"}, {"v": float("nan")}, "must be of type number"),
        ({"type": "boolean"}, {"v": 1}, "must be of type boolean"),
    ],
)
def test_a_value_that_does_not_fit_is_named(variable: dict[str, Any], values: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        render(prompt("{{v}}", v=variable), values)
    assert [reason in why for _, why in caught.value.pointers] == [True]


def test_what_is_rendered_has_a_limit_however_often_a_value_is_used() -> None:
    content = prompt("{{v}}" * 70, v=TEXT)
    with pytest.raises(InvalidRequestError, match=f"{MAX_RENDERED:,}"):
        render(content, {"v": "x" * 2_000})


def test_what_is_no_prompt_is_not_rendered() -> None:
    with pytest.raises(InvalidModelStateError):
        render(prompt("{{a}}"), {"a": "x"})


# --- differences --------------------------------------------------------------------------------------


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [line for line in diff(before, after)[2:] if line[0] in "+-"]


def test_equal_contents_differ_in_nothing_whatever_their_order() -> None:
    assert diff({"a": 1, "b": [1, 2]}, {"b": [1, 2], "a": 1}) == []


def test_a_template_is_compared_line_by_line() -> None:
    before, after = prompt("one\ntwo\nthree", a=TEXT), prompt("one\n2\nthree", a=TEXT)
    assert changes(before, after) == ["-| two", "+| 2"]


def test_other_content_is_compared_member_by_member() -> None:
    before = {"rules": [{"id": "a", "when": "x"}, {"id": "b", "when": "y"}]}
    after = {"rules": [{"id": "a", "when": "x"}, {"id": "b", "when": "z"}]}
    assert changes(before, after) == ['-      "when": "y"', '+      "when": "z"']
