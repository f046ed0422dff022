import json

import pytest

from experiments import calibrate_balance
from jaxrec.distributed import balance


@pytest.mark.slow
def test_costs_are_measured_fitted_and_kept(tmp_path):
    sizes = calibrate_balance.Settings(
        width=8, num_blocks=1, repeats=2, steps=((2, 8), (64, 8), (4, 64), (1, 256), (2, 512))
    )
    found = calibrate_balance.run(
        sizes, save=tmp_path / "costs.json", scratch=True, folder=tmp_path
    )
    assert balance.CostModel.load(tmp_path / "costs.json") == found.model
    (path,) = (tmp_path / "calibrate_balance").glob("*.json")
    result = json.loads(path.read_text())
    assert len(result["measurements"]) == 5
    assert result["checks"]["costs"] == vars(found.model)
