"""One of several processes that balance together; prints the digest of each of its ranks' batches.

python balanced_worker.py <number> <of how many> <port of the first>
"""

import hashlib
import sys

import jax
import numpy as np

from jaxrec.data import SequenceDataset, training_batches
from jaxrec.distributed import BalanceConfig, BalancedBatches, OverMesh
from jaxrec.ops.jagged import JaggedBatch
from jaxrec.sharding import make_mesh

DEVICES = 2
CONFIG = BalanceConfig(max_sequences=16, token_budget=128, outlier_tokens=30)


def rank_source(rank: int):
    """The batches that a rank reads; some ranks have more of them than others."""
    rng = np.random.default_rng(rank)
    lengths = np.minimum(rng.zipf(1.4, 20 + 3 * rank) + 1, 50)
    sequences = [rng.integers(1, 31, length).tolist() for length in lengths]
    batches = training_batches(
        SequenceDataset.from_sequences(sequences, num_items=30), mode="sequences", max_len=50,
        token_budget=64, max_sequences=6, seed=rank, num_epochs=1,
    )  # fmt: skip
    return iter(batches)


def digests(batches: JaggedBatch) -> list[str]:
    """A digest of each rank's batch."""
    ranks = zip(*batches, strict=True)
    return [
        hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in rank)).hexdigest()[:16]
        for rank in ranks
    ]


def main(number: int, count: int, port: int) -> None:
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, number)
    transport = OverMesh(make_mesh({"data": count * DEVICES}), "data")
    sources = [rank_source(rank) for rank in transport.local_ranks]
    for step, batches in enumerate(BalancedBatches(sources, transport, CONFIG)):
        for rank, digest in zip(transport.local_ranks, digests(batches), strict=True):
            print("batch", step, rank, digest, flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
