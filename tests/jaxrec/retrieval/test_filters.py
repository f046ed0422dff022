"""The filter language: round trips, precedence, and every error with its place."""

import operator
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.retrieval import F, FilterError, parse_filter
from jaxrec.retrieval.filters import MAX_DEPTH, And, Everything, Not, Nothing, Or, Term, any_of

A, B, C, D = (Term("f", value) for value in "abcd")

names = st.one_of(
    st.sampled_from(
        ["language", "not", "AND", "a b", 'quo"te', "back\\slash", "", "ünï", "1", "*"]
    ),
    st.text(max_size=6),
)
recipes = st.recursive(
    st.tuples(names, names),
    lambda inner: st.one_of(
        st.tuples(st.just(operator.invert), inner),
        st.tuples(st.sampled_from([operator.and_, operator.or_]), inner, inner),
    ),
    max_leaves=12,
)


def build(recipe):
    if isinstance(recipe[0], str):
        return Term(*recipe)
    return recipe[0](*map(build, recipe[1:]))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(recipes)
def test_text_round_trip(recipe):
    tree = build(recipe)
    assert parse_filter(str(tree)) == tree


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("", Everything()),
        ("  ", Everything()),
        ("ALL", Everything()),
        ("NONE", Nothing()),
        ("f:a", A),
        ("f:a AND f:b OR f:c AND f:d", Or((And((A, B)), And((C, D))))),
        ("f:a OR f:b AND f:c OR f:d", Or((A, And((B, C)), D))),
        ("f:a AND (f:b OR f:c) AND f:d", And((A, Or((B, C)), D))),
        ("NOT f:a AND f:b", And((Not(A), B))),
        ("NOT (f:a AND f:b)", Not(And((A, B)))),
        ("NOT NOT f:a", A),
        ("NOT (NOT (f:a))", A),
        ("!f:a & f:b | f:c", Or((And((Not(A), B)), C))),
        ("f:a && f:b || f:c", Or((And((A, B)), C))),
        ("not f:a and f:b or f:c", Or((And((Not(A), B)), C))),
        ("f IN [a, b]", Or((A, B))),
        ("NOT f in [a] AND f:b", And((Not(A), B))),
        ("f IN []", Nothing()),
        ("f : 'a'", A),
        ('"f":"a"', A),
        (r'f:"say \"hi\""', Term("f", 'say "hi"')),
        ("f:and", Term("f", "and")),
        ("in:IN", Term("in", "IN")),
        ("f:''", Term("f", "")),
        ("f:a AND (f:b AND f:c)", And((A, B, C))),
        ("f:a AND ALL", A),
        ("f:a AND NONE", Nothing()),
        ("f:a OR ALL", Everything()),
    ],
)
def test_precedence_and_forms(text, tree):
    assert parse_filter(text) == tree


def test_builder_makes_the_parsed_tree():
    built = (
        (F("language") == "en")
        & (F("category").isin(["music"]) | (F("creator") == 42))
        & (F("category") != "pop")
    )
    text = "language:en AND (category:music OR creator:42) AND NOT category:pop"
    assert parse_filter(text) == built
    assert str(built) == text
    assert (F("on") == True) == Term("on", "true")  # noqa: E712


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("f:a f:b", 5, "found 'f'; expected AND, OR, ')' or the end"),
        ("(f:a", 1, "this parenthesis is never closed"),
        ("f:a AND ((f:b OR f:c)", 9, "this parenthesis is never closed"),
        ("f:a)", 4, "this parenthesis was never opened"),
        ("f:'a", 3, "the quote opened here is never closed"),
        ("NOT", 4, "found the end; expected a term"),
        ("f:a AND", 8, "found the end; expected a term"),
        ("f:a AND OR f:b", 9, "found 'OR'; expected a term"),
        ("f", 2, "found the end; expected ':' and a value, or IN [..], after feature 'f'"),
        ("f:", 3, "found the end; expected a value"),
        ("f:&", 3, "found '&'; expected a value"),
        ("f:(a)", 3, "found '('; expected a value"),
        ("f IN a", 6, "found 'a'; expected '[' and a list of values"),
        ("f IN [a b]", 9, "found 'b'; expected ',' or ']'"),
        ("f IN [a,,b]", 9, "found ','; expected a value"),
        ("f IN [a", 8, "found the end; expected ',' or ']'"),
        ("()", 2, "found ')'; expected a term"),
        ("f=a", 2, "found '='"),
        ("g:a", 1, "unknown feature 'g'; expected one of category, f, language"),
        ("langage:a", 1, "unknown feature 'langage' (did you mean 'language'?)"),
    ],
)
def test_errors_name_the_place(text, column, message):
    with pytest.raises(FilterError, match=re.escape(message)) as caught:
        parse_filter(text, features={"f", "category", "language"})
    headline, shown, caret = str(caught.value).split("\n")
    assert headline.startswith(f"column {column}: ")
    assert shown == f"  {text}"
    assert caret == " " * (column + 1) + "^"


def test_error_in_a_long_filter_shows_its_surroundings():
    with pytest.raises(FilterError) as caught:
        parse_filter("f:a AND " * 500 + "oops " + "AND f:b" * 500)
    _, shown, caret = str(caught.value).split("\n")
    assert len(shown) < 120
    assert shown[caret.index("^") :].startswith("AND f:b")


def test_ten_thousand_terms():
    tree = parse_filter(" OR ".join(f"f:{i}" for i in range(10_000)))
    assert isinstance(tree, Or)
    assert len(tree.operands) == 10_000
    assert any_of([F("f") == i for i in range(10_000)]) == tree
    assert parse_filter("(" * 10_000 + "f:a" + ")" * 10_000) == A
    assert parse_filter("NOT " * 10_001 + "f:a") == Not(A)


def test_too_deep_and_too_long_are_clear_errors():
    deep = "".join(f"f:a {'AND' if i % 2 else 'OR'} (" for i in range(5_000))
    with pytest.raises(FilterError, match=f"more than {MAX_DEPTH} levels"):
        parse_filter(deep + "f:a" + ")" * 5_000)
    with pytest.raises(FilterError, match="more than the limit"):
        F("f").isin(range(100_001))


def test_misuse_of_the_builder():
    with pytest.raises(FilterError, match=r"a string or an integer, not 1\.5"):
        _ = F("f") == 1.5
    with pytest.raises(FilterError, match="no truth value"):
        _ = A and B
