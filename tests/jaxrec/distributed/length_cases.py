"""Length distributions that balance is measured on."""

from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).parents[4] / "shared" / "data"


def zipf(count: int, seed: int, exponent: float = 1.2, longest: int = 4095) -> np.ndarray:
    values = np.arange(1, longest + 1)
    weights = values**-exponent
    return np.random.default_rng(seed).choice(values, count, p=weights / weights.sum())


def log_normal(count: int, seed: int, median: float, sigma: float, longest: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).lognormal(np.log(median), sigma, count)
    return np.clip(np.rint(drawn), 1, longest).astype(np.int64)


def kuairand_1k(count: int, seed: int) -> np.ndarray:
    return log_normal(count, seed, median=3379, sigma=0.89, longest=8192)


def kuairand_27k(count: int, seed: int) -> np.ndarray:
    return log_normal(count, seed, median=8591, sigma=0.80, longest=49_332)


def ml_1m(count: int, seed: int) -> np.ndarray:
    path = DATA / "ml-1m-gsasrec" / "train" / "input.txt"
    if not path.exists():
        pytest.skip(f"the data set is not here: {path.name} of MovieLens-1M")
    lengths = np.array([len(line.split()) for line in path.read_text().splitlines()])
    return np.random.default_rng(seed).choice(lengths, count)


PUBLISHED = {
    "zipf": (zipf, 1.01),
    "kuairand-1k": (kuairand_1k, 1.01),
    "kuairand-27k": (kuairand_27k, 1.01),
    "ml-1m": (ml_1m, 1.03),
}
"""Name → (lengths, the most that max/mean may be at 256 ranks of 32 samples)."""
