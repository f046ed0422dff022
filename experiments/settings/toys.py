"""Amazon Toys, 5-core (19,412 users, 11,924 items).

Leave-one-out, full ranking over all items, history filtered, ties counted against the model. The
published figures do not all say whether they filter the history.
"""

from pathlib import Path

from experiments.settings import base
from experiments.settings.base import Published, Setting

DATA = Path("../shared/data/amazon-toys")
LEADERS = (
    Published("eSASRec study, SASRec + sampled softmax", 0.0970, 0.0580),
    Published("eSASRec study, eSASRec", 0.0939, 0.0538),
)


def sasrec() -> Setting:
    """See `base.sasrec`."""
    return base.sasrec(DATA)


def hstu() -> Setting:
    """See `base.hstu`."""
    return base.hstu(DATA, Published("eSASRec study, HSTU", 0.0778, 0.0450))


def filter() -> Setting:
    """See `base.filtered`; item numbers only."""
    return base.filtered(DATA, *LEADERS, attributes=False)


def best() -> Setting:
    """See `base.filtered`; with the items' attributes."""
    return base.filtered(DATA, *LEADERS, attributes=True)
