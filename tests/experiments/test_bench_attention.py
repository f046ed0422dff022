import json

import numpy as np
import pytest

from experiments import bench_attention


def test_cases_fill_their_slots():
    cases = bench_attention.cases()
    assert set(cases) == {
        f"{kind}_{n}" for kind in ("fixed", "zipf") for n in ("512", "1k", "2k", "4k", "8k", "16k")
    }
    for case in cases.values():
        lengths = case.lengths()
        assert lengths.sum() == case.num_tokens
        assert lengths.max() <= case.longest
        assert case.kind == "zipf" or len(set(lengths)) == 1
    # Mean length of the law: Σ n^-0.2 / Σ n^-1.2 over 64 … 4,096, about 760.
    assert 600 < np.mean(cases["zipf_4k"].lengths()) < 1000
    fixed = cases["fixed_4k"]
    assert fixed.flops("forward") == 32 * 4 * 4 * 128 * (4096 * 4097 // 2)


@pytest.mark.slow
def test_a_run_is_recorded_with_plots(tmp_path, monkeypatch, capsys):
    arguments = ["bench_attention", "--quick", "--cases", "zipf_2k", "--repeats", "1"]
    arguments += ["--scratch", "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    bench_attention.main()
    assert "ours, biases" in capsys.readouterr().out
    (path,) = tmp_path.glob("bench_attention/*.json")
    saved = json.loads(path.read_text())
    for checks in saved["checks"].values():
        agreed = {name: checks[name] for name in ("xla", "padded", "ours, biases", "xla, biases")}
        assert all(error < bench_attention.TOLERANCE for error in agreed.values()), agreed
    timed = {(m["pass"], m["backend"]) for m in saved["measurements"] if m["metric"] == "time"}
    assert {("forward", "jax"), ("gradient", "padded"), ("gradient", "matmul")} <= timed
    assert len(list(tmp_path.glob("bench_attention/*.png"))) == 2


def test_a_wrong_answer_ends_the_run(monkeypatch):
    case = bench_attention.quick(bench_attention.cases()["fixed_512"])
    right = bench_attention.variants

    def wrong(case, pass_name):
        every = right(case, pass_name)
        padded = every["padded"]
        run = lambda *qkv: 1.1 * padded.run(*qkv)  # noqa: E731
        return {
            "ours": every["ours"],
            "padded": bench_attention.dataclasses.replace(padded, run=run),
        }

    monkeypatch.setattr(bench_attention, "variants", wrong)
    with pytest.raises(SystemExit, match=r"fixed_512 forward padded: wrong by 0\.(1|09)"):
        bench_attention.measure(case, "forward", repeats=1)
