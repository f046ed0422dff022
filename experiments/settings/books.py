"""Amazon Books (about 694,000 users, 686,000 items): `--data` holds `sequences.txt`.

Leave-one-out, full ranking, history filtered. Made for a GPU; sizes after the HSTU paper.
"""

from dataclasses import replace
from pathlib import Path

from experiments.settings.base import LARGE_CATALOGUE, Setting
from jaxrec.nn import HSTUConfig, SASRecConfig

DATA = Path("data/amazon-books")
TRAIN = replace(LARGE_CATALOGUE, token_budget=12_800, max_sequences=1024)


def sasrec() -> Setting:
    """SASRec, width 64."""
    model = SASRecConfig(
        num_items=1, max_len=50, width=64, num_blocks=4, num_heads=4, dropout=0.5,
        compute_dtype="bfloat16",
    )  # fmt: skip
    return Setting(DATA, model, TRAIN, min_count=5)


def hstu() -> Setting:
    """HSTU-large: 16 blocks of 8 heads."""
    model = HSTUConfig(
        num_items=1, max_len=50, width=64, num_blocks=16, num_heads=8, dropout=0.5,
        time_buckets=64, compute_dtype="bfloat16",
    )  # fmt: skip
    return Setting(DATA, model, TRAIN, min_count=5)
