"""Answers match as text, as the last number, or field by field."""

from __future__ import annotations

import time

import pytest

from stillhouse.protos.evaluation.answers import fields_of, last_number
from stillhouse.protos.evaluation.row_sums import score_texts


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 1,234.50.", "1234.5"),
        ("pages 10-20", "20"),
        ("(4)-5", "5"),
        ("x = -5", "-5"),
        ("x=-5", "-5"),
        ("\N{MINUS SIGN}5", "-5"),
        ("$-7", "-7"),
        ("1e-3", "0.001"),
        ("He has 3 apples and -4.0", "-4"),
        ("#### 42\n", "42"),
        ("7 of 9 #### 8", "8"),
        ("1e3", "1000"),
        (".5", "0.5"),
        ("e5 on page", "5"),
        ("none", None),
        ("1234,567", "567"),
        ("#### \n 7 apples of 9 \n", "9"),
        ("7 #### 8\n9", "9"),
        ("-0.0", "0"),
        ("1e9999999", "10e9999998"),
        ("1e99999999999999999999", None),
    ],
)
def test_the_last_number_counts(text: str, number: str | None) -> None:
    found = last_number(text)
    assert found == (None if number is None else last_number(number))


def test_numbers_differ_by_their_last_digit_and_least_exponent() -> None:
    assert last_number("1" + "0" * 40 + "1") != last_number("1" + "0" * 40 + "2")
    assert last_number("1e-9999999") != last_number("0")


def test_white_space_without_end_takes_no_time() -> None:
    began = time.monotonic()
    assert last_number("####" + " " * 20_000 + "\n7\n8") == 8
    assert fields_of("```" + "\n" * 20_000 + "7") is None
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}',
        'Here: ```json  \n\n{"a": 1}\n```',
        'Here: ```json\n{"a": 1}\n```',
        '<think>{"a": 2}</think> {"a": 1}',
        'Sure! {"a": 1} Anything else?',
    ],
)
def test_fields_are_found_in_what_models_write(text: str) -> None:
    assert fields_of(text) == {"a": 1}


@pytest.mark.parametrize("text", ["", "[1]", "{", "a: 1", "[" * 100_000])
def test_what_is_no_object_has_no_fields(text: str) -> None:
    assert fields_of(text) is None


def test_accuracy_by_each_comparison() -> None:
    def accuracy(match: str, answers: list[str], references: list[str]) -> float:
        return score_texts("accuracy", answers, references, match=match)["accuracy"].value

    assert accuracy("exact", [" yes\n", "Yes"], ["yes", "yes"]) == 0.5
    assert accuracy("numeric", ["so 12.0", "13", "none"], ["12", "12", "none"]) == pytest.approx(1 / 3)


def test_each_field_of_the_references_has_its_own_accuracy() -> None:
    references = ['{"name": "Ada", "age": 36}', '{"name": "Bob"}']
    answers = ['{"name": "Ada ", "age": "36"}', "no JSON"]
    scores = score_texts("accuracy", answers, references, match="fields")
    assert {name: each.value for name, each in scores.items()} == {
        "accuracy": pytest.approx(1 / 3),
        "accuracy/name": 0.5,
        "accuracy/age": 0.0,
    }


@pytest.mark.parametrize(
    ("answer", "reference", "is_equal"),
    [
        ("true", "1", False),
        ("[true]", "[1]", False),
        ('{"b": [{"c": 0}]}', '{"b": [{"c": false}]}', False),
        ("[1, 2]", "[1]", False),
        ("[]", "{}", False),
        ("[1.0, null]", "[1, null]", True),
        ('[" x"]', '["x "]', True),
        ('{"b": 1, "c": 2}', '{"c": 2, "b": 1}', True),
        ("[" * 900 + "]" * 900, "[" * 900 + "]" * 900, True),
    ],
)
def test_values_of_fields_are_equal_in_their_types_at_any_depth(
    answer: str, reference: str, is_equal: bool
) -> None:
    answers, references = [f'{{"a": {answer}}}'], [f'{{"a": {reference}}}']
    found = score_texts("accuracy", answers, references, match="fields")["accuracy"].value
    assert found == float(is_equal)
