"""Prioritised steps as scheduled for eight H200: what runs while early rows travel."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scheduled_exchanges import exchanges

from jaxrec.distributed import (
    LATE,
    EmbeddingTable,
    PipelineState,
    PrioritizedStep,
    RowAdagrad,
    ShardedTables,
    init_sharded_state,
)
from pallas_kernels.aot import aot_available, h200_mesh

aot = pytest.mark.aot
needs_tools = pytest.mark.skipif(aot_available() is not None, reason=str(aot_available()))

DIM, WIDTH, OWN_IDS, ROWS = 256, 2048, 4096, 1_000_000
PLACES, LATE_PLACES = 640, 128
OPTIONS: Any = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_experimental_parallel_collective_overlap_limit": 2,
}


def tower_loss(params, embeddings, target):
    hidden = embeddings["items"].astype(jnp.bfloat16)
    for kernel in params:
        hidden = jax.nn.silu(hidden @ kernel.astype(jnp.bfloat16))
    return jnp.mean((hidden - target).astype(jnp.float32) ** 2), ()


def compiled_step(memory: Any = "device"):
    mesh = h200_mesh({"data": 8})
    table = EmbeddingTable("items", ROWS, DIM, RowAdagrad(0.1), memory=memory)
    tables, sgd = ShardedTables([table], mesh), optax.sgd(0.1)
    capacity = {"items": PLACES, "items" + LATE: LATE_PLACES}
    pipeline = PrioritizedStep(tables, tower_loss, sgd, capacity)
    shapes = [(DIM, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH)]
    ids = jax.ShapeDtypeStruct((8 * OWN_IDS,), jnp.int32)
    target = jax.ShapeDtypeStruct((8 * OWN_IDS, WIDTH), jnp.bfloat16)

    def start(ids, target):
        params = [jnp.zeros(shape) for shape in shapes]
        state = init_sharded_state(tables, params, sgd, key=jax.random.key(0))
        ahead, deferred = pipeline._exchange.begin(
            state.tables, {"items": ids}, target, (("items", PLACES),)
        )
        return PipelineState(state, ahead, deferred)

    split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
    carry = jax.eval_shape(start, ids, target)
    by_default = jax.tree.map(lambda x: split if x.ndim else whole, carry)
    shardings = by_default._replace(
        state=by_default.state._replace(
            tables=tables.shardings(), params=jax.tree.map(lambda x: whole, carry.state.params)
        ),
        ahead=by_default.ahead._replace(
            plan=by_default.ahead.plan._replace(
                report=jax.tree.map(lambda x: whole, carry.ahead.plan.report)
            )
        ),
    )

    def placed(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    arguments = (
        jax.tree.map(placed, carry, shardings), {"items": placed(ids, split)},
        placed(target, split),
    )  # fmt: skip
    step: Any = pipeline.build(capacity)
    return step.lower(*arguments).compile(compiler_options=OPTIONS)


@aot
@needs_tools
def test_computation_runs_while_early_rows_and_deferred_gradients_travel():
    compiled = compiled_step()
    text = compiled.as_text()
    early, late = f"f32[8,{PLACES},{DIM}]", f"f32[8,{LATE_PLACES},{DIM}]"
    found = exchanges(text)
    assert [e.result for e in found].count(early) == 2
    assert [e.result for e in found].count(late) == 2
    assert all(e.products for e in found if e.result == early)
    shard_bytes = ROWS // 8 * DIM * 4
    assert compiled.memory_analysis().temp_size_in_bytes < shard_bytes, "no copy of the table"


@aot
@needs_tools
def test_rows_in_host_memory_compile():
    compiled = compiled_step("pinned_host")
    shard_bytes = ROWS // 8 * DIM * 4
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes + memory.argument_size_in_bytes < shard_bytes
    assert memory.host_argument_size_in_bytes >= shard_bytes
