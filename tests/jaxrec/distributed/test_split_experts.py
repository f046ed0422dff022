"""A layer with its experts split over devices equals the whole one, gradients included."""

import re
from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxrec.distributed import split_experts
from jaxrec.functional import split_params
from jaxrec.nn import MoEConfig, MoELayer
from jaxrec.ops.expert_parallel import ExpertParallel, split_ffn
from jaxrec.sharding import make_mesh

WIDTH, EXPERTS = 16, 8


def layer(seed=0, **options: Any) -> MoELayer:
    sizes: dict[str, Any] = {"width": WIDTH, "num_experts": EXPERTS, "hidden": 12, "slots": 2}
    return MoELayer(MoEConfig(**sizes | options), rngs=nnx.Rngs(seed))


def tokens(count=48, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((count, WIDTH)), jnp.float32)


def routed_to(moe: MoELayer, preferred: dict[int, float]) -> None:
    """Gives experts a head start on every token whose first feature is 1."""
    for expert, lead in preferred.items():
        moe.router.kernel[...] = moe.router.kernel[...].at[0, expert].add(lead)


def value_report_gradients(moe, x, valid=None):
    return _value_report_gradients(*nnx.split(moe, nnx.Param, ...), x, valid)


@partial(jax.jit, static_argnums=0)  # layers of one kind share their program
def _value_report_gradients(structure, params, rest, x, valid):
    def loss(params, x):
        out, report = nnx.merge(structure, params, rest)(x, valid=valid)
        return (jnp.sin(out.astype(jnp.float32)) ** 2).sum() + report.loss, (out, report)

    (_, (out, report)), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return out, report, grads


def assert_same(moe, mesh, x, *, atol=1e-5, valid=None, **options):
    """Splits `moe`; returns the split layer's report and gradients."""
    wanted = value_report_gradients(moe, x, valid)
    split_experts(moe, mesh, **options)
    axes = options.get("token_axes") or mesh.axis_names
    if len(x) % mesh.size == 0:
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(axes)))
    found = value_report_gradients(moe, x, valid)
    assert int(found[1].stats.dropped) == 0
    for a, b in zip(*(jax.tree.leaves(part) for part in (found, wanted)), strict=True):
        scale = max(1, float(jnp.abs(b).max(initial=0)))
        np.testing.assert_allclose(a, b, atol=atol * scale)
    return found[1], found[2]


@pytest.mark.parametrize(("shards", "save"), [(8, "gate_up"), (2, "x"), (4, "gate_up_fp8")])
def test_equals_the_whole_layer(shards, save):
    moe = layer(shared_hidden=10, bias=True, save=save, cv_weight=0.1)
    mesh = make_mesh({"expert": shards})
    report, (grads, _) = assert_same(moe, mesh, tokens(), atol=1e-5)
    assert int(report.stats.load.sum()) == 48 * 2, "the load is that of all devices' tokens"
    assert {s.data.shape[0] for s in moe.experts.w_up[...].addressable_shards} == {8 // shards}
    grad = grads["experts"]["w_up"][...]
    assert {s.data.shape[0] for s in grad.addressable_shards} == {8 // shards}, "nothing gathered"


@pytest.mark.parametrize(
    ("slots", "experts", "shards"),
    [(4, 8, 8), (3, 6, 2), (5, 8, 4)],
)
def test_slots_and_experts_of_any_number(slots, experts, shards):
    mesh = make_mesh({"expert": shards})
    assert_same(layer(slots=slots, num_experts=experts), mesh, tokens())


@pytest.mark.parametrize("count", [0, 13])
def test_tokens_need_not_divide(count):
    assert_same(layer(shared_hidden=6), make_mesh({"expert": 4}), tokens(count))


def test_padding_goes_nowhere():
    valid = jnp.arange(48) % 5 != 0
    report, _ = assert_same(layer(), make_mesh({"expert": 8}), tokens(), valid=valid)
    assert int(report.stats.load.sum()) == 2 * int(valid.sum())


def test_all_tokens_to_one_expert_and_none_to_the_others():
    moe = layer(slots=1)
    routed_to(moe, {3: 50.0})
    report, (grads, _) = assert_same(moe, make_mesh({"expert": 8}), tokens(64).at[:, 0].set(1))
    np.testing.assert_array_equal(report.stats.load, 64 * (np.arange(8) == 3))
    used = np.abs(np.asarray(grads["experts"]["w_up"][...])).max(axis=(1, 2)) > 0
    np.testing.assert_array_equal(used, np.arange(8) == 3)


def test_skewed_routing():
    moe = layer()
    routed_to(moe, {0: 2.0, 1: 2.0, 5: 1.0, 6: -50.0})
    report, _ = assert_same(moe, make_mesh({"expert": 8}), tokens(64).at[:, 0].set(1))
    assert float(report.stats.max_over_mean) > 1.5
    assert int(report.stats.load[6]) == 0


def test_a_second_axis_splits_tokens_alone():
    mesh = make_mesh({"data": 2, "expert": 4})
    moe = layer(shared_hidden=6)
    assert_same(moe, mesh, tokens())
    shards = moe.experts.w_up[...].addressable_shards
    assert len({str(shard.index) for shard in shards}) == 4
    other = layer(shared_hidden=6)
    assert_same(other, mesh, tokens(), token_axes=("expert",))


def test_room_that_suffices_and_room_that_does_not():
    x, mesh = tokens(64).at[:, 0].set(1), make_mesh({"expert": 8})
    assert_same(layer(), mesh, x, capacity_factor=4.0)
    moe = layer(slots=1)
    routed_to(moe, {3: 50.0})
    whole = value_report_gradients(moe, x)[0]
    split_experts(moe, mesh, capacity_factor=2.0)
    out, report, grads = value_report_gradients(moe, x)
    # Each device may send 2 · 8 tokens · 1 / 8 = 2 rows to the one that all want.
    assert int(report.stats.dropped) == 64 - 8 * 2
    kept = np.arange(64) % 8 < 2
    np.testing.assert_allclose(np.asarray(out)[kept], np.asarray(whole)[kept], atol=1e-6)
    assert not np.asarray(out)[~kept].any()
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_lost_pairs_are_counted_one_by_one():
    mesh = make_mesh({"expert": 2}, devices=jax.devices()[:2])
    ids = jnp.array([[0, 1], [1, 0], [2, 3], [0, 2]])  # two tokens a device; experts 0, 1 | 2, 3
    weights: Any = {name: jnp.ones((4, 2, 2)) for name in ("w_gate", "w_up", "w_down")}
    parallel = ExpertParallel(mesh, "expert", capacity_factor=0.5)
    count = jax.jit(lambda x, ids: split_ffn(x, ids, jnp.ones((4, 2)), weights, parallel).lost)
    lost = count(jnp.ones((4, 2)), ids)
    # Device 0 sends one of its two tokens to itself, so both pairs of the other are lost; device
    # 1 sends token 2 to itself and token 3 to device 0, and so loses token 3's pair with expert 2.
    assert int(lost) == 3


def test_named_twice_and_out_of_range():
    mesh = make_mesh({"expert": 4})
    rng = np.random.default_rng(0)
    weights: Any = {
        "w_gate": rng.standard_normal((4, WIDTH, 6)), "w_up": rng.standard_normal((4, WIDTH, 6)),
        "w_down": rng.standard_normal((4, 6, WIDTH)),
    }  # fmt: skip
    weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), weights)
    ids = jnp.asarray(rng.integers(-1, 6, (24, 3)), jnp.int32)
    gates = jnp.asarray(rng.standard_normal((24, 3)), jnp.float32)

    def run(axis_size):
        mesh_ = mesh if axis_size > 1 else make_mesh({"expert": 1})
        parallel = ExpertParallel(mesh_, "expert")

        def total(x, gates):
            found = split_ffn(x, ids, gates, weights, parallel)
            return (found.out**2).sum(), found

        gradient = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
        return jax.jit(gradient)(tokens(24), gates)

    one, many = run(1), run(4)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_bf16_and_bitwise_repeatable():
    moe, mesh = layer(shared_hidden=6), make_mesh({"expert": 8})
    x = tokens().astype(jnp.bfloat16)
    wanted = value_report_gradients(moe, x)
    split_experts(moe, mesh)
    first, second = (value_report_gradients(moe, x) for _ in range(2))
    assert first[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.float32(first[0]), np.float32(wanted[0]), atol=2e-2 * float(jnp.abs(wanted[0]).max())
    )
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_model_of_several_layers():
    class Model(nnx.Module):
        def __init__(self):
            self.blocks = nnx.List([layer(seed) for seed in range(2)])

        def __call__(self, x, valid=None):
            total = None
            for block in self.blocks:
                out, report = block(x, valid=valid)
                x = x + out
                total = report if total is None else jax.tree.map(jnp.add, total, report)
            return x, total

    assert_same(Model(), make_mesh({"expert": 8}), tokens())


def test_only_rows_labels_and_sums_travel():
    """The collectives of a training step: nothing else leaves a device."""
    moe, mesh = layer(shared_hidden=10), make_mesh({"expert": 8})
    split_experts(moe, mesh)
    rebuild, params = split_params(moe)
    x = jax.device_put(tokens(64), NamedSharding(mesh, PartitionSpec("expert")))

    def loss(params, x):
        out, report = rebuild(params)(x)
        return (out**2).sum() + report.loss

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    text = gradient.lower(params, x).compile().as_text() or ""
    found = re.findall(
        r" (all-[a-z]+(?:-all)?|reduce-scatter|collective-permute)(?:-start)?\(", text
    )
    # There and back, forward and backward, and the labels with their gradient.
    assert Counter(found)["all-to-all"] == 6
    assert set(found) == {"all-to-all", "all-reduce"}, "no tokens, scores or weights are gathered"


def test_what_cannot_be_split():
    with pytest.raises(ValueError, match="experts has 6 experts, which the 4 devices of mesh axis"):
        split_experts(layer(num_experts=6), make_mesh({"expert": 4}))
    mesh = make_mesh({"data": 2, "expert": 4})
    with pytest.raises(ValueError, match="no axis 'experts'; it has data, expert"):
        split_experts(layer(), mesh, axis="experts")
    with pytest.raises(ValueError, match="expected the experts' axis 'expert' in it"):
        split_experts(layer(), mesh, token_axes=("data",))
    with pytest.raises(ValueError, match=r"capacity_factor is 0.0; expected above 0"):
        split_experts(layer(), mesh, capacity_factor=0.0)
    with pytest.raises(ValueError, match="Linear has no MoELayer"):
        split_experts(layer().router, mesh)
