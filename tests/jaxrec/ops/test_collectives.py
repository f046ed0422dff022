"""Collectives in two halves equal the plain ones, with and without JAX's own halves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src.lax import parallel
from jax.sharding import PartitionSpec as P

from jaxrec.ops import collectives
from jaxrec.sharding import make_mesh

RING = [(n, (n + 1) % 8) for n in range(8)]
CASES = {
    "all_to_all": ({"split_axis": 0, "concat_axis": 0}, {"tiled": True}),
    "all_gather": ({"axis": 0}, {"tiled": True}),
    "psum": ({}, {}),
    "psum_scatter": ({}, {"scatter_dimension": 0, "tiled": True}),
    "ppermute": ({"perm": RING}, {}),
}


def run(function, x):
    mesh = make_mesh({"data": 8})
    spread = P("data")
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spread, out_specs=spread, check_vma=False)
    return jax.jit(mapped)(x)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("halves", [True, False], ids=["halves", "plain"])
def test_started_and_done_equals_the_plain_collective(name, halves, monkeypatch):
    if not halves:
        monkeypatch.delattr(parallel, f"{name}_start")
    given, more = CASES[name]
    start, plain = getattr(collectives, f"{name}_start"), getattr(lax, name)

    def two_halves(x):
        under_way = start(x, "data", **given)
        between = jnp.sin(x)
        return under_way.done() + between.sum()

    x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    expected = run(lambda x: plain(x, "data", **given, **more) + jnp.sin(x).sum(), x)
    np.testing.assert_array_equal(run(two_halves, x), expected)
