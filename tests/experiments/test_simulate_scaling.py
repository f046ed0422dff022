import json

import pytest

from experiments import simulate_scaling
from experiments.simulate_scaling import Settings


@pytest.mark.slow
def test_everything_is_simulated_recorded_and_drawn(tmp_path, capsys):
    data = tmp_path / "data"
    (data / "ml-1m-gsasrec" / "train").mkdir(parents=True)
    (data / "ml-1m-gsasrec" / "train" / "input.txt").write_text("1 2 3\n4\n5 6\n")
    (data / "amazon-beauty").mkdir()
    (data / "amazon-beauty" / "sequences.txt").write_text("user 1 2 3\nother 4 5\n")
    sizes = Settings(
        gpus=4, samples_per_gpu=4, scales=(2, 16), num_steps=5, published_seeds=1
    )  # fmt: skip
    path = simulate_scaling.run(sizes, data=data, scratch=True, folder=tmp_path)
    result = json.loads(path.read_text())
    metrics = {m["metric"] for m in result["measurements"]}
    assert {"bubble cut", "bubble", "bubble cut alone", "bubble cut sensitivity"} <= metrics
    assert result["config"]["sources"]["nic"]
    for name in ("bubble", "qps", "parts"):
        assert path.with_suffix(f".{name}.png").stat().st_size > 5_000
    assert "Assumed, not published" in capsys.readouterr().out


def test_published_sizes_come_out_as_the_text_says():
    """A small version of the published claim, so that a change of the engine is noticed."""
    sizes = Settings(gpus=32, num_steps=6)
    draw = simulate_scaling.DISTRIBUTIONS["KuaiRand-27K-like, ≤ 21K"]
    reports = simulate_scaling.ladder_of(draw, sizes)
    cuts = [simulate_scaling.cut(reports["plain"], r) for r in reports.values()]
    assert cuts == sorted(cuts)
    assert cuts[-1] > 0.95
