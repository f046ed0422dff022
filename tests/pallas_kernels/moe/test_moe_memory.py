"""Predicted bytes against what `jax.vjp` keeps and what compiled programs ask for."""

from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import MoeMemory, MoeShape, moe_ffn, moe_memory
from pallas_kernels.aot import aot_available, compile_for_h200
from pallas_kernels.moe.workloads import WORKLOADS

SMALL = MoeShape(48, 16, 24, 4, 2, itemsize=4, backend="xla")
DTYPES = {2: jnp.bfloat16, 4: jnp.float32}


def arguments(shape: MoeShape):
    """(x, ids, gates, weights, dy) as shapes."""

    def of(*sizes, itemsize=shape.itemsize):
        return jax.ShapeDtypeStruct(sizes, DTYPES[itemsize])

    own = shape.weight_itemsize or shape.itemsize
    tokens, experts = shape.num_tokens, shape.num_experts
    inner, outer = (experts, shape.width, shape.hidden), (experts, shape.hidden, shape.width)
    weights = {"w_up": of(*inner, itemsize=own), "w_down": of(*outer, itemsize=own)}
    if shape.activation != "silu":
        weights["w_gate"] = weights["w_up"]
    if shape.biases:
        named = {f"b_{name[2:]}": w.shape[::2] for name, w in weights.items()}
        weights |= {name: of(*sizes, itemsize=own) for name, sizes in named.items()}
    ids = jax.ShapeDtypeStruct((tokens, shape.slots), jnp.int32)
    x = of(tokens, shape.width)
    return x, ids, jax.ShapeDtypeStruct(ids.shape, jnp.float32), weights, x


def pulled(shape: MoeShape, x, ids, gates, weights):
    """(y, the function from its gradient to those of x, gates and weights)."""

    def op(x, gates, weights):
        return moe_ffn(
            x,
            ids,
            gates,
            **{"w_gate": None, **weights},
            activation=shape.activation,
            save=shape.save,
            chunk_tokens=shape.chunk_tokens,
            backend=shape.backend,
        )

    return jax.vjp(op, x, gates, weights)


def gradient(shape: MoeShape):
    """The layer's training as one function of `arguments`."""

    def run(x, ids, gates, weights, dy):
        y, pull = pulled(shape, x, ids, gates, weights)
        return y, pull(dy)

    return run


@pytest.mark.parametrize("save", ["gate_up", "gate_up_fp8", "x"])
@pytest.mark.parametrize("activation", ["swiglu", "silu"])
def test_saved_bytes_are_those_that_vjp_keeps(save, activation):
    for itemsize, own, biases in product((2, 4), (2, 4), (False, True)):
        shape = replace(SMALL, save=save, activation=activation, itemsize=itemsize)
        shape = replace(shape, weight_itemsize=own, biases=biases)
        *given, _ = arguments(shape)
        kept = jax.eval_shape(lambda *args, s=shape: pulled(s, *args)[1], *given)
        kept_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
        weights = sum(leaf.size for leaf in jax.tree.leaves(given[3]))
        assert weights == shape.num_weights
        assert moe_memory(shape).saved == kept_bytes - weights * own


def check(shape: MoeShape, analysis) -> None:
    predicted = moe_memory(shape)
    # XLA adds a pointer for each result.
    assert analysis.argument_size_in_bytes == predicted.arguments
    assert 0 <= analysis.output_size_in_bytes - predicted.results <= 128
    compiled = (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
    )
    assert abs(predicted.peak / compiled - 1) < 0.1, (predicted.peak, compiled)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"save": "x"},
        {"activation": "silu", "biases": True},
        {"num_experts": 32, "slots": 4},
        {"itemsize": 2},
    ],
    ids=str,
)
def test_peak_is_that_of_the_program_compiled_for_a_cpu(changes):
    shape = replace(MoeShape(8192, 256, 512, 8, 2, itemsize=4, backend="xla"), **changes)
    compiled = jax.jit(gradient(shape)).lower(*arguments(shape)).compile()
    check(shape, compiled.memory_analysis())


def of_workload(name: str, **changes) -> MoeShape:
    w = WORKLOADS[name]
    shape = MoeShape(w.num_tokens, w.width, w.hidden, w.num_experts, w.slots)
    return replace(shape, **changes)


@pytest.mark.aot
@pytest.mark.skipif(aot_available() is not None, reason=str(aot_available()))
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("conf3", {}),
        ("conf3", {"save": "x", "chunk_tokens": 8192}),
        ("conf3", {"save": "gate_up_fp8"}),
        ("conf4", {"activation": "silu"}),
        ("sonic_7b", {"save": "x"}),
    ],
    ids=str,
)
def test_peak_is_that_of_the_program_compiled_for_an_h200(name, changes):
    shape = of_workload(name, **changes)
    report = compile_for_h200(gradient(shape), *arguments(shape), kernels=False)
    assert not report.kernels
    check(shape, report.compiled.memory_analysis())


def test_most_tokens_is_the_last_that_fits():
    for save, chunk in product(("gate_up", "x"), (None, 4096)):
        shape = of_workload("conf3", save=save, chunk_tokens=chunk)
        budget = 80 * 10**9
        most = shape.most_tokens(budget)
        assert most % 128 == 0
        assert moe_memory(replace(shape, num_tokens=most)).peak <= budget
        assert moe_memory(replace(shape, num_tokens=most + 128)).peak > budget
        assert shape.most_tokens(1000) == 0


def test_chunks_bound_what_grows_with_the_tokens():
    """With save="x" and chunks, a token more costs its rows and routing, no hidden width."""
    shape = of_workload("conf3", save="x", chunk_tokens=8192)
    more = replace(shape, num_tokens=2 * shape.num_tokens)
    grown = moe_memory(more).peak - moe_memory(shape).peak
    assert grown == shape.num_tokens * (4 * shape.width * 2 + (8 + 4) * shape.slots)
    assert isinstance(moe_memory(shape), MoeMemory)
