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


def moe() -> Setting:
    """`sasrec` with 8 experts for a feed-forward network, of which a token uses 2."""
    return base.with_experts(sasrec(), num_experts=8, slots=2, hidden=96)


def moe_dense() -> Setting:
    """`moe` with one expert as wide as two: dense, with the same multiply-adds a token."""
    return base.with_experts(sasrec(), num_experts=1, slots=1, hidden=192)


def hstu_moe() -> Setting:
    """`hstu` with the experts of `moe` behind its attention."""
    return base.with_experts(hstu(), num_experts=8, slots=2, hidden=96)


def hstu_moe_dense() -> Setting:
    """`hstu` with the network of `moe_dense` behind its attention."""
    return base.with_experts(hstu(), num_experts=1, slots=1, hidden=192)
