"""Split experts as scheduled for eight H200: what runs while tokens travel.

Of a training step's four exchanges of rows each has matrix products of the shared expert between
its start and its done:

    tokens to their experts     x · W_up                    (hidden layer of the shared expert)
    outputs back                hidden · W_down
    their gradients there       dy · W_downᵀ
    tokens' gradients back      xᵀ · d_hidden, and what else waits for none of the tokens
"""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxrec.distributed import Schedule
from jaxrec.nn import MoEConfig, MoELayer
from jaxrec.ops.expert_parallel import ExpertParallel
from pallas_kernels.aot import aot_available, compile_for_h200, h200_mesh

aot = pytest.mark.aot
needs_tools = pytest.mark.skipif(aot_available() is not None, reason=str(aot_available()))

WIDTH, HIDDEN, SHARED, EXPERTS, SLOTS, OWN_TOKENS = 1024, 1024, 2048, 64, 4, 2048
CONFIG = MoEConfig(WIDTH, EXPERTS, HIDDEN, SLOTS, shared_hidden=SHARED)


def training_step(parallel: ExpertParallel) -> tuple[Any, list[Any], Any]:
    """(function of weights, x and target; their shapes; their partition specs)."""
    model = nnx.eval_shape(lambda: MoELayer(CONFIG, rngs=nnx.Rngs(0)))
    model.experts.parallel = parallel
    graphdef, params = nnx.split(model)
    experts, whole = PartitionSpec("expert"), PartitionSpec()
    specs = jax.tree.map(lambda p: experts if p.ndim == 3 else whole, params)

    def step(params, x, target):
        def loss(params, x):
            out, report = nnx.merge(graphdef, params)(x)
            return jnp.mean((out - target).astype(jnp.float32) ** 2) + report.loss, report

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    x = jax.ShapeDtypeStruct((8 * OWN_TOKENS, WIDTH), jnp.bfloat16)
    return step, [params, x, x], (specs, experts, experts)


@aot
@needs_tools
def test_products_of_the_shared_expert_run_while_tokens_travel():
    mesh = h200_mesh({"expert": 8})
    parallel = ExpertParallel(mesh, "expert", capacity_factor=1.5)
    step, shapes, specs = training_step(parallel)
    report = compile_for_h200(
        step,
        *shapes,
        mesh=mesh,
        in_shardings=specs,
        out_shardings=((PartitionSpec(), PartitionSpec()), (specs[0], specs[1])),
        compiler_options={"xla_gpu_enable_latency_hiding_scheduler": True},
    )
    rows = 8 * parallel.capacity(OWN_TOKENS, SLOTS)
    schedule = Schedule.read(report.hlo_text)
    found = [e for e in schedule.collectives if e.result == f"bf16[{rows},{WIDTH}]"]
    assert len(found) == 4, "there and back, forward and backward, and all of them asynchronous"
    assert " all-to-all(" not in report.hlo_text
    products = [[p.result for p in schedule.beside(exchange)] for exchange in found]
    there, back, gradient_there, gradient_back = products
    hidden, out = f"bf16[{OWN_TOKENS},{SHARED}]", f"bf16[{OWN_TOKENS},{WIDTH}]"
    assert there == [f"bf16[{OWN_TOKENS},{2 * SHARED}]"], "x · W_up"
    assert back == [out], "hidden · W_down"
    assert hidden in gradient_there, "dy · W_downᵀ"
    assert f"bf16[{WIDTH},{2 * SHARED}]" in gradient_back, "xᵀ · d_hidden"
    assert "all-gather" not in report.hlo_text, "neither tokens nor scores nor weights are gathered"
    mosaic = [kernel for kernel in report.kernels if "mosaic" in kernel.name]
    kernels = [kernel for kernel in mosaic if "moe_dispatch" not in kernel.name]
    assert len(kernels) == 6, "forward and backward of the device's experts"
