import json
from functools import partial
from types import SimpleNamespace

import pytest

from experiments import moe_memory, record
from pallas_kernels import aot


@pytest.mark.parametrize(
    ("sizes", "kib"),
    [
        ((2048, 8192, 4), {"MegaBlocks": 288, "ScatterMoE": 276, "MoEBlaze, alg. 1": 196}),
        ((1536, 256, 8), {"MegaBlocks": 64, "ScatterMoE": 43, "MoEBlaze, alg. 1": 15}),
        ((7168, 2048, 8), {"MegaBlocks": 352, "ScatterMoE": 254, "MoEBlaze, alg. 1": 110}),
    ],
)
def test_others_save_what_their_code_says(sizes, kib):
    for name, wanted in kib.items():
        assert moe_memory.PEERS[name][0](*sizes) / 1024 == wanted


def test_ours_saves_less_than_every_other():
    for activation in ("swiglu", "silu"):
        for name in moe_memory.PAPER:
            row = moe_memory.saved_row(name, activation)
            assert row["x"] < row["gate_up_fp8"] < row["gate_up"]
            assert row["gate_up"] < min(row[peer] for peer in moe_memory.PEERS)


def test_the_paper_s_fourth_layer():
    row = moe_memory.saved_row("conf4", "swiglu")
    # 32,768 tokens: 132 KiB of ours, 288 KiB of MegaBlocks.
    assert row["gate_up"] == round(32_768 * (2 * 2048 + 4 * 4 * 8192 + 32) / 1e9, 2)
    assert row["MegaBlocks"] == round(32_768 * 288 * 1024 / 1e9, 2)


def test_chunks_flatten_the_peak_and_more_fits():
    rows = moe_memory.chunk_rows("conf3")
    whole, chunked = ([row[name] for row in rows] for name in ("x, all at once", "x, 4,096"))
    assert whole[-1] > 10 * whole[0]
    assert chunked[-1] < 2 * chunked[0]
    fit = moe_memory.fit_row("conf3", 12, "H100", 80)
    assert fit["gate_up"] < fit["gate_up, chunks"] < fit["gate_up_fp8, chunks"] < fit["x, chunks"]
    assert fit["gate_up"] < moe_memory.fit_row("conf3", 12, "H200", 141)["gate_up"]


def test_compiled_peaks_are_kept_as_they_come(tmp_path, monkeypatch):
    compiled = []

    def compile_for_h200(run, x, *args, kernels):
        assert not kernels
        compiled.append(x.shape)
        sizes = dict.fromkeys(("argument", "output", "temp"), 1) | {"temp": len(compiled)}
        analysis = SimpleNamespace(**{f"{name}_size_in_bytes": n for name, n in sizes.items()})
        return SimpleNamespace(compiled=SimpleNamespace(memory_analysis=lambda: analysis))

    monkeypatch.setattr(aot, "aot_available", lambda: None)
    monkeypatch.setattr(aot, "compile_for_h200", compile_for_h200)
    monkeypatch.setattr(moe_memory, "RUNS", tmp_path)
    monkeypatch.setattr(record, "git_sources", lambda folder: "1234")
    shapes = [moe_memory.shape_of("conf1", num_tokens=tokens) for tokens in (128, 256, 128)]
    assert [moe_memory._compiler(1)(shape) for shape in shapes] == [3, 4, 3]
    assert len(compiled) == 2
    later = moe_memory._compiler(0)
    assert later(shapes[1]) == 4
    assert later(moe_memory.shape_of("conf2")) is None, "no time is left"
    monkeypatch.setattr(record, "git_sources", lambda folder: None)
    assert moe_memory._compiler(1)(shapes[0]) == 5, "what is not committed may differ"


def test_the_tables_are_printed_and_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["moe_memory", "--record", "--scratch", "--gpu", "H200"])
    monkeypatch.setattr("experiments.record.write", partial(record.write, folder=tmp_path))
    moe_memory.main()
    shown = capsys.readouterr().out
    assert "MegaBlocks" in shown
    assert "H200, 141 GB" in shown
    (path,) = tmp_path.glob("moe_memory/*.json")
    metrics = {m["metric"] for m in json.loads(path.read_text())["measurements"]}
    assert {"saved gate_up", "saved MegaBlocks", "peak x", "fits x, chunks"} <= metrics
    assert path.with_suffix(".png").is_file()
