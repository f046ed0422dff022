"""Softmax attention for an H200: cuDNN where padding is cheap, XLA where not."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxrec.nn import SASRec, SASRecConfig
from jaxrec.ops.jagged import JaggedBatch
from pallas_kernels.aot import aot_available, compile_for_h200, h200_mesh
from pallas_kernels.softmax_attention.workloads import WORKLOADS

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(aot_available() is not None, reason=str(aot_available())),
]
FORWARD, BACKWARD = '"__cudnn$fmhaSoftmax"', '"__cudnn$fmhaSoftmaxBackward"'


@pytest.mark.parametrize("name", ["200", "1k", "4k"])
def test_long_sequences_take_cudnn(name):
    workload = WORKLOADS[name]
    report = compile_for_h200(workload.gradient, *workload.shapes(), kernels=False)
    text = report.hlo_text
    assert text.count(FORWARD) == text.count(BACKWARD) == 1
    assert not re.search(r"= \S+ (scatter|all-\w+)\(", text)
    padded = workload.num_sequences * workload.max_len * workload.heads * workload.width
    statistics = 4 * padded // workload.width
    # q, k and v, their gradients, the output and its gradient.
    assert report.temp_bytes <= 8 * 2 * padded + 1.01 * statistics


@pytest.mark.parametrize(("name", "dtype"), [("50", "bfloat16"), ("200", "float32")])
def test_short_sequences_and_f32_take_xla(name, dtype):
    workload = WORKLOADS[name]
    q, k, v, offsets = workload.shapes()
    wide = [jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)) for x in (q, k, v)]
    assert "cudnn" not in compile_for_h200(workload.run, *wide, offsets, kernels=False).hlo_text


def test_a_sasrec_trains_on_it_on_every_gpu():
    """JAX partitions cuDNN's calls by its own rules, which must leave `shard_map`'s alone."""
    config = SASRecConfig(num_items=1000, max_len=256, num_heads=2, compute_dtype="bfloat16")
    model = nnx.eval_shape(lambda: SASRec(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model)
    mesh = h200_mesh({"data": 2})

    def loss(params, item_ids, offsets):
        nothing = jnp.zeros_like(item_ids)
        batch = JaggedBatch(item_ids, offsets[0], nothing, nothing, nothing)
        hidden = nnx.merge(graph, params).encode(batch)
        return jax.lax.pmean(hidden.astype(jnp.float32).mean(), "data")

    mapped = jax.shard_map(
        jax.value_and_grad(loss), mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P()
    )
    tokens = jax.ShapeDtypeStruct((2 * 8192,), jnp.int32)
    offsets = jax.ShapeDtypeStruct((2, 33), jnp.int32)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    report = compile_for_h200(
        mapped,
        shapes,
        tokens,
        offsets,
        mesh=mesh,
        in_shardings=(P(), P("data"), P("data")),
        kernels=False,
    )
    text = report.hlo_text
    assert text.count(FORWARD) == text.count(BACKWARD) == config.num_blocks
    assert "all-gather" not in text
