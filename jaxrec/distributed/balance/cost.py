"""What a sample costs by its length, and how to find that out on a machine."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int


@dataclass(frozen=True)
class CostModel:
    """Seconds of a step on one rank: Σ over its samples of (c + a·L + b·L²), plus a constant.

    Attributes:
      per_token: a, s; projections, embeddings and everything else that is linear in the length.
      per_token_squared: b, s; attention.
      per_sample: c, s.
      per_step: s; the same for every rank, so no plan depends on it.

    Raises:
      ValueError: a negative or infinite number, or a, b and c all zero.
    """

    per_token: float
    per_token_squared: float = 0.0
    per_sample: float = 0.0
    per_step: float = 0.0

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value}; expected a finite number from 0")
        if not self.per_token + self.per_token_squared + self.per_sample:
            raise ValueError("all samples would cost nothing; expected a constant above 0")

    def sample_costs(self, lengths: Int[np.ndarray, "N"]) -> Float64[np.ndarray, "N"]:
        """Seconds of each sample; never less for a longer one."""
        tokens = lengths.astype(np.float64)
        return self.per_sample + self.per_token * tokens + self.per_token_squared * tokens**2

    def step_seconds(self, lengths: Int[np.ndarray, "N"]) -> float:
        """Seconds of a step over these samples on one rank."""
        return float(self.sample_costs(lengths).sum()) + self.per_step

    def save(self, path: str | Path) -> None:
        """Writes the constants as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "CostModel":
        """Reads what `save` wrote.

        Raises:
          ValueError: the file holds something else.
        """
        content = json.loads(Path(path).read_text())
        if not isinstance(content, dict) or set(content) != set(asdict(HSTU_H100)):
            raise ValueError(f"{path} does not hold the constants of a cost model")
        return cls(**content)


HSTU_H100 = CostModel(per_token=7.57e-7, per_token_squared=1.51e-10)
"""HSTU of 8 layers, width 1024, forward and backward on an H100; both parts equal at L ≈ 5,000.

From the profile of NVIDIA's recsys-examples: 187 ms a step, of which attention 43 %.
"""


class CostFit(NamedTuple):
    """A fitted cost model and how well it fits.

    Attributes:
      model: the constants, none negative.
      median_error: half of the measured steps are predicted better than this; relative.
      worst_error: relative.
    """

    model: CostModel
    median_error: float
    worst_error: float


def fit(steps: Sequence[Int[np.ndarray, "_"]], seconds: Float[np.ndarray, "S"]) -> CostFit:
    """The cost model with the least squared relative error over measured steps.

    Args:
      steps: for each measured step, the lengths of the samples that one rank had.
      seconds: what each took.

    Raises:
      ValueError: fewer than four steps, times that are not positive, or lengths so alike that
        linear and quadratic cost cannot be told apart.

    Cost: one small least-squares problem for each of the 15 sets of constants; the best without
    a negative constant is exactly the non-negative least-squares solution.
    """
    if len(steps) != len(seconds) or len(steps) < 4:
        raise ValueError(
            f"{len(steps)} steps and {len(seconds)} times; expected as many of each, at least 4"
        )
    if not (np.isfinite(seconds).all() and (seconds > 0).all()):
        raise ValueError("a measured time is not a positive number of seconds")
    sums = [[n.sum(dtype=float), (n.astype(float) ** 2).sum(), len(n), 1.0] for n in steps]
    terms = np.array(sums)
    scale = terms.max(axis=0)
    relative = terms / np.where(scale > 0, scale, 1) / seconds[:, None]
    if np.linalg.matrix_rank(relative[:, :2], tol=1e-6 * np.linalg.norm(relative[:, :2])) < 2:
        raise ValueError(
            "the measured steps are too alike to tell a·L from b·L²: measure some with many short "
            "samples and some with few long ones"
        )
    best, error = np.zeros(4), np.inf
    for size in range(1, 5):
        for chosen in map(list, itertools.combinations(range(4), size)):
            found = np.zeros(4)
            found[chosen] = np.linalg.lstsq(relative[:, chosen], np.ones(len(steps)))[0]
            squared = float(((relative @ found - 1) ** 2).sum())
            if squared < error and (found >= 0).all() and found[:3].any():
                best, error = found, squared
    errors = np.abs(relative @ best - 1)
    model = CostModel(*(best / np.where(scale > 0, scale, 1)).tolist())
    return CostFit(model, float(np.median(errors)), float(errors.max()))
