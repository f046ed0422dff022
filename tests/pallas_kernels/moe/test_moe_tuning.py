"""How kernels get and share rows is chosen: by measurements of like layers on like devices."""

import json
from dataclasses import replace

import pytest

from pallas_kernels.moe import MoeConfig, api, tuning
from pallas_kernels.moe.tuning import (
    Choice,
    Layer,
    fetch_cost,
    tuned_config,
    tuned_path,
    write_tuned,
)
from pallas_kernels.moe.workloads import WORKLOADS

MEASURED = Layer(num_pairs=4096, num_experts=8, width=256, hidden=128)


@pytest.fixture(autouse=True)
def tuned(tmp_path, monkeypatch):
    """A folder without choices instead of the recorded ones."""
    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    tuning._measured.cache_clear()
    yield
    tuning._measured.cache_clear()


def test_rows_are_gathered_unless_measured_otherwise():
    assert tuned_config(MEASURED) == MoeConfig.heuristic(4096, 8)
    assert tuned_config(MEASURED).fetch == "gather"


def test_a_measured_choice_holds_for_layers_like_it():
    write_tuned(tuned_path(), [(MEASURED, Choice("fused", 2))], {"device": "test"})
    like = [MEASURED, replace(MEASURED, num_pairs=2048), replace(MEASURED, num_pairs=8192)]
    unlike = [
        replace(MEASURED, num_pairs=8193),
        replace(MEASURED, width=128),
        replace(MEASURED, hidden=256),
        replace(MEASURED, num_experts=16),
        replace(MEASURED, gated=False),
    ]
    assert {tuned_config(layer).fetch for layer in like} == {"fused"}
    assert {tuned_config(layer).shared_tiles for layer in like} == {2}
    assert {tuned_config(layer).fetch for layer in unlike} == {"gather"}
    # The nearest of two measured layers decides; a new measurement replaces the old one.
    write_tuned(tuned_path(), [(replace(MEASURED, num_pairs=8192), Choice())], {"device": "test"})
    assert tuned_config(replace(MEASURED, num_pairs=8000)).fetch == "gather"
    assert tuned_config(replace(MEASURED, num_pairs=4100)).fetch == "fused"
    write_tuned(tuned_path(), [(MEASURED, Choice())], {"device": "later"})
    assert tuned_config(MEASURED).fetch == "gather"
    assert json.loads(tuned_path().read_text())["provenance"] == {"device": "later"}


def test_the_op_looks_its_layer_up(monkeypatch):
    asked = []
    monkeypatch.setattr(api, "tuned_config", lambda layer: asked.append(layer) or MoeConfig())
    x, ids, gates, *weights = WORKLOADS["tiny"].arrays(0)
    api.moe_ffn(x, ids, gates, *weights)
    api.moe_ffn(x, ids, gates, None, *weights[1:], activation="silu")
    layer = Layer(num_pairs=160, num_experts=4, width=128, hidden=128)
    assert asked == [layer, replace(layer, gated=False)]
    api.moe_ffn(x, ids, gates, *weights, config=MoeConfig())
    assert len(asked) == 2


@pytest.mark.parametrize("name", ["conf4", "sonic_7b"])
def test_cost_model(name):
    w = WORKLOADS[name]
    cost = fetch_cost(Layer(w.num_pairs, w.num_experts, w.width, w.hidden), multiprocessors=1)
    assert cost.rows_bytes == 2 * w.rows_bound() * w.width
    assert cost.saved_bytes == 2 * cost.rows_bytes
    # Two products of [rows, D] and [D, H], 2048 multiply-adds a cycle.
    assert cost.tensor_cycles == 2 * w.rows_bound() * w.width * w.hidden // 2048
    stages = w.rows_bound() // 128 * (w.width // 64) * (w.hidden // 128)
    assert cost.issue_slots == stages * tuning._FETCH_SLOTS
    assert cost.issue_slots < 0.2 * cost.tensor_cycles
