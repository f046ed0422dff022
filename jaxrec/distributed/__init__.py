"""Training and serving on many devices."""

from jaxrec.distributed import balance as balance
from jaxrec.distributed.balanced_batches import BalanceConfig as BalanceConfig
from jaxrec.distributed.balanced_batches import BalancedBatches as BalancedBatches
from jaxrec.distributed.experts import split_experts as split_experts
from jaxrec.distributed.global_mean import global_mean as global_mean
from jaxrec.distributed.transport import InProcess as InProcess
from jaxrec.distributed.transport import OverMesh as OverMesh
