"""Value models: each operation against its definition in float64, the grammar against Python's."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.nn import FormulaError, ValueModel
from jaxrec.nn.formula import Apply, Constant, Name, parse_formula
from jaxrec.nn.formula import from_json as tree_from_json
from jaxrec.nn.formula import to_json as tree_to_json
from jaxrec.nn.value_model import LARGEST, LOG_FLOOR

TASKS, FEATURES = ("click", "like"), ("age", "price")
NAMES = TASKS + FEATURES


def model(formula):
    return ValueModel(formula, tasks=TASKS, features=FEATURES)


def value(formula, **values):
    return float(model(formula)({name: jnp.float32(values.get(name, 0)) for name in NAMES}))


# --------------------------------------------------------------------- operations, one by one


def saturate(x):
    return min(max(x, -LARGEST), LARGEST)


def power(x, y):
    if y == 0:
        return 1.0
    if x == 0 or (x < 0 and y != math.floor(y)):
        return 0.0
    sign = -1 if x < 0 and y % 2 == 1 else 1
    exponent = y * math.log(abs(x))
    return sign * (LARGEST if exponent > 700 else math.exp(exponent))


DEFINITIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b if b else 0.0,
    "**": power,
    "neg": lambda a: -a,
    "min": min,
    "max": max,
    "clip": lambda x, low, high: min(max(x, low), high),
    "abs": abs,
    "exp": lambda a: math.exp(min(a, 700)),
    "log": lambda a: math.log(max(a, float(np.float32(LOG_FLOOR)))),
    "sqrt": lambda a: math.sqrt(max(a, 0)),
    "sigmoid": lambda a: 1 / (1 + math.exp(-a)) if a > -700 else 0.0,
    "if": lambda c, a, b: a if c else b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "and": lambda a, b: a and b,
    "or": lambda a, b: a or b,
    "not": lambda a: not a,
}

numbers = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 2.0, -3.0, 0.5, 1e30, -1e30, 1e-30, 3e38, -3e38, 100.0]),
    st.floats(-20, 20, width=32),
)


def trees(kind):
    """Formula texts of a kind, as deep as hypothesis likes."""
    leaf = st.one_of(st.sampled_from(NAMES), numbers.map(lambda x: f"({x!r})"))
    number = st.deferred(lambda: st.one_of(leaf, leaf, *_operations()))
    condition = st.deferred(
        lambda: st.one_of(
            st.sampled_from(["true", "false"]),
            st.tuples(number, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), number).map(
                lambda t: f"({t[0]} {t[1]} {t[2]})"
            ),
            st.tuples(condition, st.sampled_from(["and", "or"]), condition).map(
                lambda t: f"({t[0]} {t[1]} {t[2]})"
            ),
            condition.map(lambda c: f"(not {c})"),
        )
    )

    def _operations():
        yield st.tuples(number, st.sampled_from(["+", "-", "*", "/", "**"]), number).map(
            lambda t: f"({t[0]} {t[1]} {t[2]})"
        )
        yield number.map(lambda x: f"(-{x})")
        for name in ("abs", "exp", "log", "sqrt", "sigmoid"):
            yield number.map(lambda x, name=name: f"{name}({x})")
        for name in ("min", "max", "pow"):
            yield st.tuples(number, number).map(lambda t, name=name: f"{name}({t[0]}, {t[1]})")
        yield st.tuples(number, number, number).map(lambda t: f"clip({t[0]}, {t[1]}, {t[2]})")
        yield st.tuples(condition, number, number).map(lambda t: f"if({t[0]}, {t[1]}, {t[2]})")
        yield st.tuples(number, condition, number).map(lambda t: f"({t[0]} if {t[1]} else {t[2]})")

    return number if kind == "number" else condition


def check_node(node, values):
    """Every operation holds on the values that its own operands were found to have."""
    if isinstance(node, Constant):
        return node.value if isinstance(node.value, bool) else float(np.float32(node.value))
    if isinstance(node, Name):
        return values[str(node)]
    args = [check_node(arg, values) for arg in node.args]
    got, expected = values[str(node)], DEFINITIONS[node.op](*args)
    if isinstance(expected, bool):
        assert got is expected, str(node)
        return got
    # A power is exp(y·log x) in f32: the exponent's rounding counts, as much as the result's.
    tolerance = 2e-5 if node.op in ("**", "exp") else 2e-6
    expected = saturate(expected)
    assert math.isfinite(got), str(node)
    assert got == pytest.approx(expected, rel=tolerance, abs=2e-38), (str(node), args)
    return got


@settings(max_examples=150, deadline=None)
@given(trees("number"), st.tuples(*[numbers] * 4))
def test_every_part_of_a_formula_has_its_value(text, inputs):
    values = dict(zip(NAMES, (float(np.float32(x)) for x in inputs), strict=True))
    value_model = model(text)
    parts = {part.text: part.value for part in value_model.explain(values)}
    whole = check_node(value_model.tree, {**values, **parts})
    assert whole == pytest.approx(
        float(value_model({name: jnp.float32(x) for name, x in values.items()})), rel=1e-6
    )


@settings(max_examples=100, deadline=None)
@given(trees("number"))
def test_text_and_json_read_back_as_the_same_tree(text):
    tree = parse_formula(text, NAMES)
    assert parse_formula(str(tree), NAMES) == tree
    assert tree_from_json(json.loads(json.dumps(tree_to_json(tree))), NAMES) == tree


def test_a_deep_tree_is_written_in_time():
    """Once a node: twice would double with every level."""
    text = "click"
    for _ in range(40):
        text = f"(-{text} - like)"
    assert parse_formula(str(parse_formula(text, NAMES)), NAMES) == parse_formula(text, NAMES)


# -------------------------------------------------------------------------- grammar, as Python's

_PIECES = ["click", "like", "2", "3"]


@st.composite
def flat_formulas(draw):
    """Operators without parentheses but for a few, so that only precedence gives the structure."""
    terms = draw(st.lists(st.sampled_from(_PIECES), min_size=2, max_size=6))
    text = terms[0]
    for term in terms[1:]:
        sign = draw(st.sampled_from(["", "", "-"]))
        operator = draw(st.sampled_from(["+", "-", "*", "-", "*"]))
        text = f"{text} {operator} {sign}{term}"
        if draw(st.integers(0, 3)) == 0:
            text = f"-({text})" if draw(st.booleans()) else f"{text} ** 2"
    compare = draw(st.sampled_from(["<", ">=", "=="]))
    join = draw(st.sampled_from(["and", "or not", "or", "and not"]))
    return f"{text} if {terms[0]} {compare} {terms[1]} {join} like > 1 else click - {text}"


@settings(max_examples=100, deadline=None)
@given(flat_formulas(), st.integers(-2, 2), st.integers(-2, 2))
def test_structure_is_that_of_python(text, click, like):
    expected = eval(text, {}, {"click": click, "like": like})
    assert value(text, click=click, like=like) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-2 ** 2", -4), ("2 ** 3 ** 2", 512), ("2 ** -1", 0.5), ("(-2) ** 3", -8),
        ("10 - 4 - 3", 3), ("8 / 4 / 2", 1), ("1 if false else 2 if false else 3", 3),
        ("if(not 1 > 2 and 2 > 1, 5, 6)", 5), ("max(1, 2, 3) + min(3, 2, 1)", 4),
        ("pow(2, 10)", 1024), ("clip(5, 0, 1)", 1), ("1e3 + .5", 1000.5),
    ],
)  # fmt: skip
def test_precedence_by_example(text, expected):
    assert value(text) == expected


# ---------------------------------------------------------------------------- total, and smooth


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 / click", 0), ("0 / 0", 0), ("log(0)", math.log(1e-30)), ("log(-5)", math.log(1e-30)),
        ("sqrt(-1)", 0), ("0 ** -1", 0), ("(-8) ** 0.5", 0), ("0 ** 0", 1), ("exp(1000)", 3.4e38),
        ("exp(1000) - exp(1000)", 0), ("3e38 * 10 - 3e38 * 10", 0), ("exp(-1000)", 0),
        ("clip(2, 3, 1)", 1),
    ],
)  # fmt: skip
def test_nothing_is_undefined(text, expected):
    assert value(text) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "text",
    [
        "1 / click", "sqrt(click)", "log(click)", "click ** 0.5", "click ** 3", "click ** like",
        "exp(click * 1000 + 1000)", "if(click > 0, sqrt(click), 0)", "sigmoid(click * 1e6)",
    ],
)  # fmt: skip
@pytest.mark.parametrize("at", [0.0, -1.0, 1.0])
def test_gradients_are_finite_where_the_rules_set_in(text, at):
    def of(click):
        return model(text)({"click": click, "like": jnp.float32(0.5)})

    assert np.isfinite(jax.grad(of)(jnp.float32(at)))


def test_gradient_is_the_derivative():
    def of(click, like):
        return model("0.5 * click ** 2 / (1 + like) + log(1 + exp(click))")(
            {"click": click, "like": like}
        )

    click, like = 0.7, 0.2
    by_click, by_like = jax.grad(of, argnums=(0, 1))(jnp.float32(click), jnp.float32(like))
    sigmoid = 1 / (1 + math.exp(-click))
    assert by_click == pytest.approx(click / (1 + like) + sigmoid, rel=1e-5)
    assert by_like == pytest.approx(-0.5 * click**2 / (1 + like) ** 2, rel=1e-5)


def test_infinite_inputs_count_as_the_largest_and_nan_stays():
    assert value("click - click", click=-math.inf) == 0
    assert math.isnan(value("click + 1", click=math.nan))


# -------------------------------------------------------------------------------------- in use


def test_candidates_are_valued_in_one_traced_call():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 5, 2)).astype(np.float32)
    age = rng.integers(0, 60, (3, 5))
    valid = rng.random((3, 5)) < 0.6
    value_model = model("0.7 * click + (0.3 * like if age < 30 else 0)")
    got = jax.jit(lambda s, a, v: value_model.of_scores(s, {"age": a}, valid=v))(scores, age, valid)
    expected = 0.7 * scores[..., 0] + np.where(age < 30, 0.3 * scores[..., 1], 0)
    np.testing.assert_allclose(got, np.where(valid, expected, -np.inf), rtol=1e-6)


def test_explain_lists_the_parts_of_one_item():
    parts = model("2 * click if age < 30 else log(price)").explain(
        {"click": 0.5, "age": 20, "price": 1.0}
    )
    shown = {part.text: part.value for part in parts}
    assert shown["age < 30"] is True
    assert shown["2 * click"] == 1.0
    assert (parts[-1].text, parts[-1].value) == ("if(age < 30, 2 * click, log(price))", 1.0)
    assert model("1 + 1").explain({}) == (("1 + 1", 2.0),)
    assert model("7").explain({}) == (("7", 7.0),)


def test_a_model_goes_through_json():
    first = model("if(age < 30 and not price > 10, click ** 2, -like)")
    data = json.loads(json.dumps(first.to_json()))
    assert data["formula"]["if"][0] == {
        "and": [{"<": ["age", 30.0]}, {"not": [{">": ["price", 10.0]}]}]
    }
    again = ValueModel.from_json(data)
    assert (again.tree, again.tasks, again.features) == (first.tree, TASKS, FEATURES)
    assert again.formula == first.formula
    text = ValueModel.from_json({"formula": "click", "tasks": ["click"]})
    assert text.tree == Name("click")


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("click + clik", 9, "unknown name 'clik' (did you mean 'click'?); expected one of age, cl"),
        ("click +", 8, "found the end; expected a number, a name, a function"),
        ("click like", 7, "found 'like'; expected an operator or the end"),
        ("(click + 1", 11, "found the end; expected ')' or an operator"),
        ("click)", 6, "found ')'; expected an operator or the end"),
        ("click = 1", 7, "found '='; expected == for equality"),
        ("click ^ 2", 7, "expected ** for powers"),
        ("1 < click < 2", 11, "comparisons do not chain; expected a < b and b < c"),
        ("if(click, 1, 0)", 4, "if got a number here; expected a condition, such as x > 0"),
        ("1 + (click > 0)", 5, "+ got a condition here; expected a number"),
        ("log(click, 2)", 1, "log got 2 operands; expected 1 operands"),
        ("lg(click)", 1, "unknown function 'lg' (did you mean 'log'?)"),
        ("click if age > 1", 17, "found the end; expected else"),
        ("if click", 4, "found 'click'; expected '(', as in if(condition, a, b)"),
        ("if(age > 1, click, age > 2)", 20, "if got a condition here; expected a number"),
        ("1e99", 1, "found '1e99'; expected a number up to 3.4e+38"),
        ("", 1, "found the end; expected a number"),
        ("min(click, 1", 13, "found the end; expected ',' or ')'"),
        ("not click", 5, "not got a number here; expected a condition"),
    ],
)
def test_errors_point_at_the_place(text, column, message):
    with pytest.raises(FormulaError) as error:
        model(text)
    first, shown, caret = str(error.value).split("\n")
    assert first.startswith(f"column {column}: ")
    assert message in first
    assert caret.index("^") - (len(shown) - len(shown.lstrip(" "))) == column - 1


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ({"+": ["click", "clik"]}, r"formula.\+\[1\]: unknown name 'clik'"),
        ({"plus": [1, 2]}, "formula: unknown operation 'plus'"),
        ({"if": ["click", 1, 0]}, r"formula.if\[0\]: if got a number here"),
        ({"+": 1}, r"formula.\+: found 1; expected a list of operands"),
        ({"+": [1, None]}, r"formula.\+\[1\]: found None; expected a number, a name or an object"),
        (math.inf, "expected a number between"),
    ],
)
def test_errors_in_json_name_the_path(formula, message):
    with pytest.raises(FormulaError, match=message):
        model(formula)


def test_conditions_bad_names_and_missing_values_are_refused():
    with pytest.raises(FormulaError, match=r"click > 0 is a condition; expected a number"):
        model("click > 0")
    with pytest.raises(FormulaError, match="'a-b' cannot stand in a formula"):
        ValueModel("1", tasks=("a-b",))
    with pytest.raises(FormulaError, match="given twice"):
        ValueModel("1", tasks=("a",), features=("a",))
    with pytest.raises(FormulaError, match="needs formula and tasks"):
        ValueModel.from_json({})
    with pytest.raises(ValueError, match="reads like, which is not among the values given: click"):
        model("click + like")({"click": jnp.zeros(2)})
    with pytest.raises(ValueError, match="scores of 3 tasks; the value model names 2"):
        model("click").of_scores(jnp.zeros((1, 2, 3)))


def test_depth_is_limited_before_python_gives_up():
    for text in ("(" * 500 + "1" + ")" * 500, " + ".join(["click"] * 500), "-" * 500 + "click"):
        with pytest.raises(FormulaError, match="more than 100 levels"):
            model(text)
    assert value(" + ".join(["1"] * 90)) == 90
    deep = Apply("neg", (Name("click"),), "number", 2)
    assert str(deep) == "-click"


def test_a_model_is_part_of_a_module_that_is_split_and_merged():
    graphdef, state = nnx.split(nnx.List([model("click ** 2 + 1")]))

    @functools.partial(jax.jit, static_argnums=0)
    def call(graphdef, state, click):
        return nnx.merge(graphdef, state)[0]({"click": click})

    assert call(graphdef, state, jnp.float32(3)) == 10
    assert jax.tree.leaves(state) == []
