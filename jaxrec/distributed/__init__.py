"""Training and serving on many devices."""

from jaxrec.distributed import balance as balance
from jaxrec.distributed.experts import split_experts as split_experts
