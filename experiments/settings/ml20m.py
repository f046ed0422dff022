"""MovieLens-20M (138,493 users, 26,744 items): `--data` is the folder with `ratings.csv`.

Leave-one-out, full ranking, history filtered. Made for a GPU; sizes after the HSTU paper.
"""

from pathlib import Path

from experiments.settings.base import Setting
from jaxrec.nn import HSTUConfig, SASRecConfig
from jaxrec.train import LossConfig, OptimizerConfig, TrainConfig

DATA = Path("data/ml-20m")
TRAIN = TrainConfig(
    token_budget=25_600,
    max_sequences=256,
    loss=LossConfig("sampled", num_negatives=512),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=500),
    num_epochs=100,
    eval_users=8192,
    patience=10,
)


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
