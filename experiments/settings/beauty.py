"""Amazon Beauty, 5-core (22,363 users, 12,101 items).

Leave-one-out, full ranking over all items, history filtered, ties counted against the model. The
published figures do not all say whether they filter the history.
"""

from pathlib import Path

from experiments.settings.base import Published, Setting
from jaxrec.nn import HSTUConfig, SASRecConfig
from jaxrec.train import OptimizerConfig, TrainConfig

DATA = Path("../shared/data/amazon-beauty")
TRAIN = TrainConfig(
    token_budget=1024,
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100),
    ema_decay=0.999,
    num_epochs=40,
    eval_users=8192,
    patience=5,
)


def sasrec() -> Setting:
    """SASRec as it is known: attention only, item numbers only, full softmax."""
    return Setting(
        DATA,
        SASRecConfig(num_items=1, max_len=50, width=64, num_blocks=2, dropout=0.5),
        TRAIN,
        published=(Published("eSASRec study, SASRec (2018 loss)", 0.0605, 0.0318),),
    )


def hstu() -> Setting:
    """HSTU with the same width, depth and loss."""
    return Setting(
        DATA,
        HSTUConfig(num_items=1, max_len=50, width=64, num_blocks=2, dropout=0.5),
        TRAIN,
        published=(Published("eSASRec study, HSTU", 0.0788, 0.0439),),
    )


def filter() -> Setting:
    """A causal frequency filter beside attention; item numbers only."""
    return Setting(
        DATA,
        SASRecConfig(num_items=1, max_len=50, width=64, dropout=0.5, filter_share=0.7),
        TRAIN,
        published=(
            Published("eSASRec study, eSASRec", 0.0928, 0.0523),
            Published("BSARec, training log", 0.1008, 0.0611),
        ),
    )


def best() -> Setting:
    """The filter, and items embedded with their attributes."""
    return Setting(
        DATA,
        SASRecConfig(num_items=1, max_len=50, width=64, dropout=0.5, filter_share=0.7),
        TRAIN,
        attributes=True,
        published=(
            Published("eSASRec study, eSASRec", 0.0928, 0.0523),
            Published("BSARec, training log", 0.1008, 0.0611),
        ),
    )
