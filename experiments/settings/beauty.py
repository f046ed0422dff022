"""Amazon Beauty, 5-core (22,363 users, 12,101 items).

Leave-one-out, full ranking over all items, history filtered, ties counted against the model. The
published figures do not all say whether they filter the history.
"""

from pathlib import Path

from experiments.settings import base
from experiments.settings.base import Published, Setting

DATA = Path("../shared/data/amazon-beauty")
LEADERS = (
    Published("eSASRec study, eSASRec", 0.0928, 0.0523),
    Published("BSARec, training log", 0.1008, 0.0611),
)


def sasrec() -> Setting:
    """See `base.sasrec`."""
    return base.sasrec(DATA, Published("eSASRec study, SASRec (2018 loss)", 0.0605, 0.0318))


def hstu() -> Setting:
    """See `base.hstu`."""
    return base.hstu(DATA, Published("eSASRec study, HSTU", 0.0788, 0.0439))


def filter() -> Setting:
    """See `base.filtered`; item numbers only."""
    return base.filtered(DATA, *LEADERS, attributes=False)


def best() -> Setting:
    """See `base.filtered`; with the items' attributes."""
    return base.filtered(DATA, *LEADERS, attributes=True)
