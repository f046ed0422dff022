"""Samples to ranks so that all finish together: costs, strategies, bounds and outliers.

    ranks = balance.assign(lengths, 256, samples_per_rank=48, token_budget=16_384)
    plan = balance.plan(lengths, 256)            # the same, with order and quality
    print(plan.quality.max_over_mean, plan.quality.bound)

All of it is NumPy on the host, and a function of its arguments alone: every process that knows
the lengths comes to the same plan, bit for bit, without talking to the others.
"""

from jaxrec.distributed.balance.cost import HSTU_H100 as HSTU_H100
from jaxrec.distributed.balance.cost import CostFit as CostFit
from jaxrec.distributed.balance.cost import CostModel as CostModel
from jaxrec.distributed.balance.cost import fit as fit
from jaxrec.distributed.balance.outliers import OutlierPolicy as OutlierPolicy
from jaxrec.distributed.balance.outliers import Pieces as Pieces
from jaxrec.distributed.balance.outliers import outlier_limit as outlier_limit
from jaxrec.distributed.balance.outliers import treat_outliers as treat_outliers
from jaxrec.distributed.balance.planning import Order as Order
from jaxrec.distributed.balance.planning import Plan as Plan
from jaxrec.distributed.balance.planning import Strategy as Strategy
from jaxrec.distributed.balance.planning import assign as assign
from jaxrec.distributed.balance.planning import plan as plan
from jaxrec.distributed.balance.quality import Quality as Quality
from jaxrec.distributed.balance.quality import measure as measure
