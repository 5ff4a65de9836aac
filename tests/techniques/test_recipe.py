"""The recipe's text: read with Python's parser, executed never."""

import json

import pytest
from torch import nn

from lissom.errors import LissomError, NotApplicable
from lissom.export.plan import Plan
from lissom.runtime.target import Target
from lissom.techniques.recipe import Recipe

MODEL = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten())


@pytest.mark.parametrize(
    "text", ["", "fuse()", "fuse() + int8(keep=('head',), linear='conv')", "fuse() + bf16() + int8(products=32)"]
)
def test_text_and_back(text):
    assert str(Recipe.parse(text)) == text


def test_the_order_is_canonical_and_parentheses_may_be_left_out():
    assert str(Recipe.parse("int8 + fuse")) == "fuse() + int8()"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("int8(", "cannot be read"),
        ("int9()", "no technique is called 'int9'"),
        ("int8(bits=4)", "no knob 'bits'"),
        ("int8('head')", "by name"),
        ("int8(linear='cnv')", "'matmul' or 'conv'"),
        ("int8(keep='head')", "tuple"),
        ("int8(keep=open)", "not a literal"),
        ("fuse() - int8()", "not of the form"),
        ("__import__('os').system('true')", "not of the form"),
        ("missing.json", "cannot be read"),
    ],
)
def test_what_is_wrong_is_said(text, says):
    with pytest.raises(LissomError) as caught:
        Recipe.of(text)
    assert says in str(caught.value)


def test_from_a_result_and_from_a_plan(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"best": {"recipe": "int8()"}}))
    (tmp_path / "plan.json").write_text(json.dumps({"recipe": "fuse() + int8()"}))
    assert str(Recipe.of(tmp_path / "result.json")) == "int8()"
    assert str(Recipe.of(str(tmp_path / "plan.json"))) == "fuse() + int8()"
    (tmp_path / "no.json").write_text("[]")
    with pytest.raises(LissomError, match="no field 'recipe'"):
        Recipe.of(tmp_path / "no.json")


def test_twice_the_same_is_refused():
    with pytest.raises(NotApplicable, match="twice"):
        Recipe.parse("int8() + int8()").check(Plan.of(MODEL), Target())


def test_reasons_say_what_would_do():
    plan = Plan.of(MODEL)
    with pytest.raises(NotApplicable, match="no bf16 arithmetic"):
        Recipe.parse("bf16()").check(plan, Target())
    with pytest.raises(NotApplicable, match="--runtime openvino"):
        Recipe.parse("int8()").check(plan, Target("torch"))
    with pytest.raises(NotApplicable, match="'hed'"):
        Recipe.parse("int8(keep=('hed',))").check(plan, Target())
    with pytest.raises(NotApplicable, match="nothing to fuse"):
        Recipe.parse("fuse()").check(Plan.of(nn.Linear(3, 3)), Target())
    Recipe.parse("bf16()").check(plan, Target(capabilities=frozenset({"bf16"})))
