"""Weights in other libraries' layouts: right places, the same bits back, errors with names."""

from typing import Any

import jax
import jaxtyping
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from jaxrec.distributed import split_experts
from jaxrec.nn import MoEConfig, MoELayer, export_moe, import_moe
from jaxrec.sharding import make_mesh

D, H, E, S = 6, 5, 4, 3
PREFIX = "model.layers.2."
# What each layout has room for besides router and experts.
OPTIONS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen_moe": {"shared_hidden": S},
    "deepseek": {"shared_hidden": S, "bias_rate": 0.1},
    "stacked": {"shared_hidden": S},
    "gpt_oss": {"bias": True},
    "megatron": {"shared_hidden": S, "bias_rate": 0.1, "bias": True},
    "megablocks": {},
}


def layer(seed=0, **options: Any) -> MoELayer:
    moe = MoELayer(MoEConfig(D, E, H, **options), rngs=nnx.Rngs(seed))
    keys = iter(jax.random.split(jax.random.key(seed), 99))
    state = jax.tree.map(lambda a: jax.random.normal(next(keys), a.shape), nnx.state(moe))
    nnx.update(moe, state)
    return moe


def experts(moe, name) -> np.ndarray:
    return np.asarray(getattr(moe.experts, name)[...])


@pytest.mark.parametrize("layout", OPTIONS)
@pytest.mark.parametrize("dtype", [None, ml_dtypes.bfloat16])
def test_there_and_back_gives_the_same_bits(layout, dtype):
    tensors = export_moe(layer(0, **OPTIONS[layout]), layout, prefix=PREFIX, dtype=dtype)
    other = layer(1, **OPTIONS[layout])
    import_moe(other, tensors, layout, prefix=PREFIX)
    again = export_moe(other, layout, prefix=PREFIX, dtype=dtype)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert tensor.tobytes() == again[name].tobytes(), name
    if dtype is None:
        for a, b in zip(
            *(jax.tree.leaves(nnx.state(m)) for m in (layer(0, **OPTIONS[layout]), other)),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)


def test_per_expert_tensors_are_transposed_matrices():
    moe = layer(shared_hidden=S, bias_rate=0.1)
    found = export_moe(moe, "deepseek", prefix=PREFIX)
    assert len(found) == 2 + 3 * E + 3
    for name, part in (("gate_proj", "w_gate"), ("up_proj", "w_up"), ("down_proj", "w_down")):
        for e in range(E):
            tensor = found[f"{PREFIX}mlp.experts.{e}.{name}.weight"]
            np.testing.assert_array_equal(tensor, experts(moe, part)[e].T)
    assert found[f"{PREFIX}mlp.gate.weight"].shape == (E, D)
    assert found[f"{PREFIX}mlp.gate.e_score_correction_bias"].shape == (E,)
    assert moe.shared_up is not None
    gate = found[f"{PREFIX}mlp.shared_experts.gate_proj.weight"]
    np.testing.assert_array_equal(gate, np.asarray(moe.shared_up.kernel[...])[:, :S].T)
    mixtral = export_moe(layer(), "mixtral")
    np.testing.assert_array_equal(
        mixtral["block_sparse_moe.experts.1.w3.weight"], experts(layer(), "w_up")[1].T
    )
    assert mixtral["block_sparse_moe.experts.1.w1.weight"].shape == (H, D)
    assert mixtral["block_sparse_moe.experts.1.w2.weight"].shape == (D, H)


def test_fused_tensors():
    moe = layer(bias=True)
    gate, up = experts(moe, "w_gate"), experts(moe, "w_up")
    found = export_moe(moe, "gpt_oss")
    both = found["mlp.experts.gate_up_proj"]
    np.testing.assert_array_equal(both[..., ::2], gate)
    np.testing.assert_array_equal(both[..., 1::2], up)
    np.testing.assert_array_equal(
        found["mlp.experts.gate_up_proj_bias"][:, 1::2], experts(moe, "b_up")
    )
    assert found["mlp.experts.down_proj"].shape == (E, H, D)
    stacked = export_moe(layer(), "stacked")["mlp.experts.gate_up_proj"]
    np.testing.assert_array_equal(stacked[:, :H], experts(layer(), "w_gate").swapaxes(1, 2))
    np.testing.assert_array_equal(stacked[:, H:], experts(layer(), "w_up").swapaxes(1, 2))
    megatron = export_moe(moe, "megatron")
    np.testing.assert_array_equal(megatron["mlp.experts.linear_fc1.weight2"][H:], up[2].T)
    np.testing.assert_array_equal(
        megatron["mlp.experts.linear_fc1.bias2"][:H], experts(moe, "b_gate")[2]
    )


def test_grouped_rows():
    found = export_moe(layer(), "megablocks")
    assert {tensor.shape for name, tensor in found.items() if "mlp" in name} == {(E * H, D)}
    for e in range(E):
        rows = slice(e * H, (e + 1) * H)
        np.testing.assert_array_equal(found["experts.mlp.v1"][rows], experts(layer(), "w_up")[e].T)
        np.testing.assert_array_equal(found["experts.mlp.w2"][rows], experts(layer(), "w_down")[e])


def test_imported_weights_compute_what_the_layout_means():
    rng = np.random.default_rng(0)
    tensors = {"block_sparse_moe.gate.weight": rng.standard_normal((E, D))}
    for e in range(E):
        shapes = {"w1": (H, D), "w2": (D, H), "w3": (H, D)}
        for name, shape in shapes.items():
            tensors[f"block_sparse_moe.experts.{e}.{name}.weight"] = rng.standard_normal(shape)
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    moe = MoELayer(MoEConfig(D, E, H, slots=1), rngs=nnx.Rngs(0))
    import_moe(moe, tensors, "mixtral")
    x = rng.standard_normal((7, D)).astype(np.float32)
    out = nnx.jit(lambda moe, x: moe(x)[0])(moe, x)
    for token in range(7):
        e = int(np.argmax(tensors["block_sparse_moe.gate.weight"] @ x[token]))
        w1, w2, w3 = (tensors[f"block_sparse_moe.experts.{e}.w{i}.weight"] for i in (1, 2, 3))
        gate = w1 @ x[token]
        wanted = w2 @ (gate / (1 + np.exp(-gate)) * (w3 @ x[token]))
        np.testing.assert_allclose(out[token], wanted, atol=1e-5)


def test_split_experts_stay_split():
    moe, whole = layer(), layer(1)
    tensors = export_moe(whole, "qwen_moe")
    split_experts(moe, make_mesh({"expert": 2}))
    import_moe(moe, tensors, "qwen_moe")
    assert len({str(s.index) for s in moe.experts.w_up[...].addressable_shards}) == 2
    for name, tensor in export_moe(moe, "qwen_moe").items():
        np.testing.assert_array_equal(tensor, tensors[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"mlp.experts.3.up_proj.weight": None},
            r"mlp.experts.3.up_proj.weight is missing; expected \[5, 6\], found model.layers.2.mlp."
            r"experts.3.down_proj.weight, model.layers.2.mlp.experts.3.gate_proj.weight",
        ),
        (
            {"mlp.experts.1.gate_proj.weight": np.zeros((6, 5), np.float32)},
            r"mlp.experts.1.gate_proj.weight has shape \[6, 5\]; expected \[5, 6\]",
        ),
        (
            {"mlp.gate.weight": np.zeros((E, D), np.int8)},
            "mlp.gate.weight is int8; expected one of float32, bfloat16, float16",
        ),
        (
            {"mlp.experts.4.up_proj.weight": np.zeros((5, 6), np.float32)},
            r"no counterpart of model.layers.2.mlp.experts.4.up_proj.weight \[5, 6\]; it has 4 exp",
        ),
        (
            {"mlp.shared_expert_gate.weight": np.zeros((1, 6), np.float32)},
            r"no counterpart of model.layers.2.mlp.shared_expert_gate.weight \[1, 6\]",
        ),
    ],
)
def test_errors_name_the_tensor_and_nothing_changes(change, message):
    tensors: dict[str, Any] = dict(export_moe(layer(1), "qwen_moe", prefix=PREFIX))
    tensors["model.layers.20.mlp.gate.weight"] = np.zeros(3)  # another layer's: left alone
    for name, tensor in change.items():
        tensors[PREFIX + name] = tensor
        if tensor is None:
            del tensors[PREFIX + name]
    moe = layer()
    before = jax.tree.leaves(nnx.state(moe))
    with pytest.raises(ValueError, match=message):
        import_moe(moe, tensors, "qwen_moe", prefix=PREFIX)
    assert all(a is b for a, b in zip(before, jax.tree.leaves(nnx.state(moe)), strict=True))


@pytest.mark.parametrize(
    ("options", "layout", "message"),
    [
        ({"bias": True}, "mixtral", "no place for the layer's b_gate, b_up, b_down"),
        ({"noise": True}, "deepseek", "no place for the layer's router noise"),
        ({"shared_hidden": 3}, "megablocks", "no place for the layer's shared_gate, shared_up"),
        ({"activation": "silu"}, "mixtral", "has a gate projection"),
        ({}, "gpt2", "layout is 'gpt2'; expected one of mixtral, qwen_moe, deepseek"),
    ],
)
def test_what_a_layout_cannot_hold(options, layout, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        export_moe(layer(**options), layout)
    with pytest.raises(ValueError, match=message):
        import_moe(layer(**options), {}, layout)
