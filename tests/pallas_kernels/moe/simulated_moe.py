"""The op with its kernels named, whatever the device: for the simulator, and for shapes alone."""

import contextlib
import functools

import jax
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.moe import api, dispatch, mosaic_gpu, mosaic_gpu_dispatch, row_fetch


def value_and_gradients(x, ids, gates, experts, dy, **how):
    """(y, (dx, d_gates, d_experts)) as `moe_ffn` differentiates, but on the kernels."""
    y, pull = residuals(x, ids, gates, experts, **how)
    return y, pull(dy)


def residuals(x, ids, gates, experts, **how):
    """(y, the function from dy to the gradients, which holds what is kept)."""
    how = api._How(backend="mosaic_gpu", **how)
    return jax.vjp(lambda x, g, e: api._ffn(x, ids, g, e, how), x, gates, experts)


def dispatched(ids, *, num_experts, programs):
    """`moe_dispatch` on its kernel, whose programs have several blocks each if they are few."""
    kernel = functools.partial(mosaic_gpu_dispatch.rank_pairs, programs=programs)
    with (
        _changed(dispatch, _backend=lambda *_: "mosaic_gpu"),
        _changed(mosaic_gpu_dispatch, rank_pairs=kernel),
    ):
        return dispatch.moe_dispatch(ids, num_experts=num_experts)


def fetched_forward(*args, **how):
    """`mosaic_gpu.forward`; rows are fetched by plain loads, since the simulator has no others."""

    def start(rows, target):
        def copy(n, _):
            target[pl.ds(n, 1)] = rows.table[pl.ds(rows.numbers[n], 1)]

        lax.fori_loop(0, rows.numbers.shape[0], copy, None)

    with _changed(row_fetch, start=start, wait=lambda latest: None):
        return mosaic_gpu.forward(*args, **how)


@contextlib.contextmanager
def _changed(module, **names):
    before = {name: getattr(module, name) for name in names}
    vars(module).update(names)
    yield
    vars(module).update(before)


def several_layers(x, ids, gates, layers, dy, **how):
    """`value_and_gradients` of layers of one kind, their experts stacked, by `jax.vmap`."""
    run = functools.partial(value_and_gradients, **how)
    return jax.vmap(lambda experts: run(x, ids, gates, experts, dy))(layers)
