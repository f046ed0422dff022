import json
import sys
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax import lax

from experiments import bench_moe
from pallas_kernels import moe_saved_bytes
from pallas_kernels._timing import Timing
from pallas_kernels.moe.tuning import Choice, Layer


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conf3_silu", "sonic_7b_skewed"])
def test_variants_agree_and_ours_saves_what_is_promised(name):
    case = bench_moe.small(bench_moe.cases()[name])
    found, checks = bench_moe.measure(case, "gradient", repeats=1)
    peers = {"materialised", "ragged_dot"}
    mine = {"ours, gate_up", "ours, gate_up_fp8", "ours, x", bench_moe.FETCHED}
    mine |= set(bench_moe.SHARED_TILES.values())
    assert {"dense", *mine, *peers} <= set(found)
    assert all(checks[name] < bench_moe.TOLERANCE for name in peers)
    w = case.workload
    for save in ("gate_up", "gate_up_fp8", "x"):
        wanted = moe_saved_bytes(
            w.num_tokens, w.width, w.hidden, w.slots, save=save, activation=case.activation
        )
        assert found[f"ours, {save}"].saved == wanted
    assert min(found[name].saved for name in peers) > found["ours, gate_up"].saved
    assert all(m.peak > m.saved and m.timing.p50_us > 0 for m in found.values())


def test_tokamax_is_timed_where_it_is_installed(monkeypatch):
    case = bench_moe.small(bench_moe.cases()["conf1"])
    arrays = case.arrays()
    assert "tokamax" not in bench_moe.variants(case, arrays[1])
    calls = []

    def ragged_dot(rows, weights, sizes):
        calls.append((rows.shape, weights.shape, sizes.shape))
        return lax.ragged_dot(rows, weights, sizes)

    monkeypatch.setitem(sys.modules, "tokamax", SimpleNamespace(ragged_dot=ragged_dot))
    run = bench_moe.variants(case, arrays[1])["tokamax"]
    assert jax.eval_shape(run, *arrays).shape == arrays[0].shape
    rows = (case.workload.num_pairs, 128)
    assert calls == [(rows, (4, 128, 128), (4,))] * 3


def test_a_wrong_answer_ends_the_run(monkeypatch):
    case = bench_moe.small(bench_moe.cases()["conf1"])
    right = bench_moe.materialised

    def wrong(case, capacity):
        run = right(case, capacity)
        return lambda *arrays: 1.1 * run(*arrays)

    kept = ("ours, gate_up", "materialised")
    every = bench_moe.variants
    monkeypatch.setattr(bench_moe, "materialised", wrong)
    monkeypatch.setattr(
        bench_moe, "variants", lambda *a: {n: run for n, run in every(*a).items() if n in kept}
    )
    with pytest.raises(SystemExit, match=r"conf1 forward materialised: wrong by 0\.(1|09)"):
        bench_moe.measure(case, "forward", repeats=1)


def test_the_fastest_way_over_all_routings_is_the_choice():
    few, usual, many = bench_moe.SHARED_TILES.values()

    def measured(**us):
        return {name: bench_moe.Measured(Timing((time,)), 0, 0) for name, time in us.items()}

    def passes(forward, gradient):
        return {"forward": measured(**forward), "gradient": measured(**gradient)}

    fetches = {bench_moe.FETCHED: 1.0, usual: 2.0}
    even = passes(fetches, {few: 1.0, usual: 2.0, many: 3.0})
    skewed = passes({bench_moe.FETCHED: 5.0, usual: 3.0}, {few: 5.0, usual: 3.5, many: 2.9})
    assert bench_moe.best([even]) == Choice("fused", 2)
    assert bench_moe.best([even, skewed]) == Choice("gather", 8)
    cases = bench_moe.cases()
    assert cases["conf3_silu"].layer() == Layer(262_144, 16, 1024, 4096, gated=False)
    chosen = {name: cases[name] for name in ("conf4", "conf4_skewed", "conf4_silu")}
    found: Any = {(name, each): name for name in chosen for each in bench_moe.PASSES}
    layers = bench_moe.by_layer(chosen, found)
    together = [[routing["forward"] for routing in layer] for layer in layers.values()]
    assert together == [["conf4", "conf4_skewed"], ["conf4_silu"]]


def test_cases_are_those_of_the_literature():
    cases = bench_moe.cases()
    assert len([name for name in cases if name.startswith("conf")]) == 15
    # MoEBlaze's fourth layer: 18·T·K·D·H; without a gate two thirds.
    assert cases["conf4"].flops("gradient") == 18 * 32_768 * 4 * 2048 * 8192
    assert cases["conf4_silu"].flops("forward") == 4 * 32_768 * 4 * 2048 * 8192
    sonic = cases["sonic_7b"].workload
    assert (sonic.num_tokens, sonic.width, sonic.hidden) == (24_576, 1536, 256)
    conf4 = bench_moe.small(cases["conf4_skewed"])
    load = np.bincount(np.asarray(conf4.arrays()[1]).reshape(-1))
    assert load.max() > 2 * load.min()


@pytest.mark.slow
def test_a_run_is_recorded_with_plots(tmp_path, monkeypatch, capsys):
    arguments = ["bench_moe", "--small", "--workloads", "conf1", "--repeats", "1"]
    arguments += ["--scratch", "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    bench_moe.main()
    assert "ours, gate_up" in capsys.readouterr().out
    (path,) = tmp_path.glob("bench_moe/*.json")
    saved = json.loads(path.read_text())
    assert {m["metric"] for m in saved["measurements"]} == {"time", "saved", "peak"}
    assert {"conf1 forward", "conf1 gradient"} == set(saved["checks"])
    assert len(list(tmp_path.glob("bench_moe/*.png"))) == 3
