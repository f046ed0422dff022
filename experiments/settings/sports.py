"""Amazon Sports, 5-core (35,598 users, 18,357 items).

Leave-one-out, full ranking over all items, history filtered, ties counted against the model. The
published figures do not all say whether they filter the history.
"""

from pathlib import Path

from experiments.settings import base
from experiments.settings.base import Published, Setting

DATA = Path("../shared/data/amazon-sports")
LEADERS = (
    Published("eSASRec study, SASRec + sampled softmax", 0.0569, 0.0314),
    Published("eSASRec study, eSASRec", 0.0560, 0.0323),
)


def sasrec() -> Setting:
    """See `base.sasrec`."""
    return base.sasrec(DATA, Published("eSASRec study, SASRec (2018 loss)", 0.0350, 0.0192))


def hstu() -> Setting:
    """See `base.hstu`."""
    return base.hstu(DATA, Published("eSASRec study, HSTU", 0.0437, 0.0243))


def filter() -> Setting:
    """See `base.filtered`; item numbers only."""
    return base.filtered(DATA, *LEADERS, attributes=False)


def best() -> Setting:
    """See `base.filtered`; with the items' attributes."""
    return base.filtered(DATA, *LEADERS, attributes=True)
