"""MovieLens-20M (138,493 users, 26,744 items): `--data` is the folder with `ratings.csv`.

Leave-one-out, full ranking, history filtered. Made for a GPU; sizes after the HSTU paper.
"""

from dataclasses import replace
from pathlib import Path

from experiments.settings.base import LARGE_CATALOGUE, Setting
from jaxrec.nn import HSTUConfig, SASRecConfig

DATA = Path("data/ml-20m")
TRAIN = replace(LARGE_CATALOGUE, token_budget=25_600, max_sequences=256)


def sasrec() -> Setting:
    """SASRec, width 256."""
    model = SASRecConfig(
        num_items=1,
        max_len=200,
        width=256,
        num_blocks=4,
        num_heads=4,
        dropout=0.2,
        compute_dtype="bfloat16",
    )
    return Setting(DATA, model, TRAIN, min_count=5)


def hstu() -> Setting:
    """HSTU-large: 16 blocks of 8 heads, with time bias."""
    model = HSTUConfig(
        num_items=1,
        max_len=200,
        width=256,
        num_blocks=16,
        num_heads=8,
        dropout=0.2,
        time_buckets=64,
        compute_dtype="bfloat16",
    )
    return Setting(DATA, model, TRAIN, min_count=5)
