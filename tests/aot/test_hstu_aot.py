"""The HSTU attention kernels as the compiler sees them: no spills, tensor cores, linear memory."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import hstu_attention, hstu_attention_cached
from pallas_kernels.aot import aot_available, compile_for_h200, table_rows

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(aot_available() is not None, reason=str(aot_available())),
]
MASK = {"max_attn_len": 300, "contextual_len": 3, "min_full_attn_len": 20}


def shapes(
    num_tokens,
    *,
    heads=4,
    widths=(64, 64),
    max_len=1024,
    position=False,
    times=False,
    dtype: Any = jnp.bfloat16,
):
    """Arguments of `op`, None for what is missing."""
    array = jax.ShapeDtypeStruct
    q, v = (array((num_tokens, heads, width), dtype) for width in widths)
    return (
        q,
        q,
        v,
        array((33,), jnp.int32),
        array((32,), jnp.int32),
        array((heads, max_len), jnp.float32) if position else None,
        array((num_tokens,), jnp.int32) if times else None,
        array((heads, 40), jnp.float32) if times else None,
    )


def op(q, k, v, offsets, targets, position_bias, timestamps, time_bias, *, max_len, **mask: Any):
    return hstu_attention(
        q,
        k,
        v,
        offsets,
        max_len=max_len,
        alpha=0.125,
        num_targets=targets,
        position_bias=position_bias,
        timestamps=timestamps,
        time_bias=time_bias,
        **mask,
    )


def out_and_gradients(
    q, k, v, offsets, targets, position_bias, timestamps, time_bias, **static: Any
):
    """The op's result, and the gradients of everything that has one."""

    def run(q, k, v, position_bias, time_bias):
        lists = (offsets, targets)
        return op(q, k, v, *lists, position_bias, timestamps, time_bias, **static)

    out, pull = jax.vjp(run, q, k, v, position_bias, time_bias)
    return out, pull(v)


def cached(q, k, v, lengths, targets, position_bias, timestamps, time_bias, *, max_len, **mask):
    return hstu_attention_cached(
        q,
        k,
        v,
        lengths,
        max_len=max_len,
        alpha=0.125,
        num_targets=targets,
        position_bias=position_bias,
        timestamps=timestamps,
        time_bias=time_bias,
        **mask,
    )


def _found(pattern, text):
    match = re.search(pattern, text)
    assert match is not None
    return match[1]


def check(report, names):
    kernels = [kernel for kernel in report.kernels if "mosaic" in kernel.name]
    assert len(kernels) == len(names)
    for name in names:
        kernel = report.kernel(f"{name}_mosaic_gpu")
        assert kernel.spill_store_bytes == kernel.spill_load_bytes == 0, name
        entry = kernel.ptx[kernel.ptx.index(f".entry {kernel.name}") :]
        threads = int(_found(r"\.maxntid (\d+)", entry))
        assert kernel.registers * threads <= 65_536, "a program's threads fit its registers"
        assert kernel.count("HGMMA") > 0
        assert kernel.count("UTMALDG") >= 3
        assert kernel.count("UTMASTG") >= 4 or name == "hstu_bias_gradient"
        atomics = sum(kernel.count(opcode) for opcode in ("ATOMG", "RED", "REDG"))
        assert atomics == 0, f"{name} would not be deterministic"


@pytest.mark.parametrize(
    ("widths", "biased", "dtype"),
    [
        ((32, 96), True, "bfloat16"),
        ((64, 64), True, "bfloat16"),
        ((128, 128), False, "bfloat16"),
        ((256, 224), True, "bfloat16"),
        ((256, 256), True, "bfloat16"),  # works of 64 rows
        ((64, 64), False, "float32"),
        ((128, 128), True, "float32"),
    ],
)
def test_out_and_gradients(widths, biased, dtype, record_property):
    arguments = shapes(8192, widths=widths, position=biased, times=biased, dtype=dtype)
    report = compile_for_h200(
        lambda *args: out_and_gradients(*args, max_len=1024, **(MASK if biased else {})),
        *arguments,
    )
    workload = f"{widths[0]} + {widths[1]}" + ", biases" * biased + ", f32" * (dtype == "float32")
    record_property("kernel_table", table_rows("hstu_attention", workload, report))
    names = ["hstu_attention", "hstu_query_gradient", "hstu_key_gradient"]
    names += ["hstu_value_gradient"] * (sum(widths) > 128) + ["hstu_bias_gradient"] * biased
    check(report, names)
    # Four operands, of 6 bytes a value in f32, and four results, each before and behind its move.
    itemsize = jnp.dtype(dtype).itemsize
    rows = 8192 * 4 * 2 * sum(widths) * (itemsize + (6 if itemsize == 4 else 2))
    assert report.temp_bytes < rows + 2**26, "more than copies"


def test_cached():
    array = jax.ShapeDtypeStruct
    batch, new, capacity = 32, 2, 1024
    q, k, v = (array((batch, rows, 4, 64), jnp.bfloat16) for rows in (new, capacity, capacity))
    *_, position, _, time = shapes(8, position=True, times=True)
    numbers, times = array((batch,), jnp.int32), array((batch, capacity), jnp.int32)
    report = compile_for_h200(
        lambda *args: cached(*args, max_len=1024, **MASK),
        *(q, k, v, numbers, numbers, position, times, time),
    )
    check(report, ["hstu_attention_cached"])
    assert report.temp_bytes < k.size * 2, "the cache is copied"


def test_memory_is_linear_in_tokens():
    """One sequence may fill all slots, from 2,048 to 65,536."""

    def temp_bytes(num_tokens):
        arguments = shapes(num_tokens, max_len=num_tokens, position=True)
        return compile_for_h200(
            lambda *args: out_and_gradients(*args, max_len=num_tokens), *arguments, kernels=False
        ).temp_bytes

    small, large = temp_bytes(2048), temp_bytes(65_536)
    assert large <= 1.05 * 32 * small
