"""MovieLens-1M in gSASRec's split: 6,040 users, 3,416 items, 512 validation users.

Full ranking over all items, history filtered. `load_split` says what the folder holds.
"""

from pathlib import Path

from experiments.settings.base import Published, Setting
from jaxrec.nn import HSTUConfig, SASRecConfig
from jaxrec.train import LossConfig, OptimizerConfig, TrainConfig

DATA = Path("../shared/data/ml-1m-gsasrec")
STEPS_PER_EPOCH = 245  # of all windows in batches of 4,096 tokens


def _train(num_epochs: int) -> TrainConfig:
    """All events of long histories, and a learning rate that falls to the end."""
    return TrainConfig(
        sampling="windows",
        token_budget=4096,
        max_sequences=128,
        optimizer=OptimizerConfig(
            learning_rate=2e-3, warmup_steps=100, decay_steps=num_epochs * STEPS_PER_EPOCH - 100
        ),
        ema_decay=0.999,
        num_epochs=num_epochs,
        patience=0,
    )


def sasrec() -> Setting:
    """SASRec with the full softmax."""
    return Setting(
        DATA,
        SASRecConfig(num_items=1, max_len=200, width=64, num_blocks=2, dropout=0.2),
        _train(10),
        published=(Published("gSASRec, checkpoint of SASRec", None, 0.1428),),
    )


def gsasrec() -> Setting:
    """SASRec with many negatives and calibrated binary cross-entropy."""
    loss = LossConfig("gbce", num_negatives=256, calibration=0.75)
    return Setting(
        DATA,
        SASRecConfig(num_items=1, max_len=200, width=128, num_blocks=3, dropout=0.5),
        TrainConfig(
            token_budget=4096,
            max_sequences=128,
            loss=loss,
            optimizer=OptimizerConfig(learning_rate=1e-3),
            num_epochs=200,
            patience=20,
        ),
        published=(Published("gSASRec, checkpoint", None, 0.1974),),
    )


def hstu() -> Setting:
    """HSTU of four blocks with the full softmax."""
    return Setting(
        DATA,
        HSTUConfig(num_items=1, max_len=200, width=64, num_blocks=4, num_heads=2, dropout=0.2),
        _train(16),
        published=(Published("gSASRec, checkpoint", None, 0.1974),),
    )
