"""Tiny kernels, right and wrong, that the simulator is tried on."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def _call(body, x, grid, **scratch):
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=grid,
        grid_names=("i",),
        scratch_types=scratch,
    )(x)


def double(x):
    def body(x_ref, o_ref):
        rows = pl.ds(lax.axis_index("i") * 128, 128)
        o_ref[rows] = x_ref[rows] * 2

    return _call(body, jnp.asarray(x), (x.shape[0] // 128,))


def overlap(x):
    """Two blocks write the same rows."""

    def body(x_ref, o_ref):
        rows = pl.ds((lax.axis_index("i") // 2) * 128, 128)
        o_ref[rows] = x_ref[rows] * 2

    return _call(body, jnp.asarray(x), (2,))


def hang(x):
    """Waits for a second arrival that nobody makes."""

    def body(x_ref, o_ref, barrier):
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)
        o_ref[...] = x_ref[...]

    return _call(body, jnp.asarray(x), (1,), barrier=plgpu.Barrier(num_arrivals=2))
