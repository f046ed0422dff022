"""Models in every combination of options, and batches to run them on."""

from dataclasses import replace
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.nn import HSTU, HSTUConfig, MoEConfig, SASRec, SASRecConfig
from jaxrec.ops.jagged import JaggedBatch

NUM_ITEMS, MAX_LEN = 12, 18  # blocks of 16 slots, so that sequences cross them

_SASREC = SASRecConfig(NUM_ITEMS, MAX_LEN, width=8, num_blocks=2, ffn_factor=2)
_HSTU = HSTUConfig(NUM_ITEMS, MAX_LEN, width=8, num_blocks=2)

SASREC = {
    f"sasrec-filter{share}-{positions}": replace(
        _SASREC, filter_share=share, positions=positions, num_heads=2 if share else 1
    )
    for share, positions in product((0.0, 0.3), ("start", "end"))
}
HSTUS = {
    f"hstu-time{buckets}-absolute{absolute}": replace(
        _HSTU,
        time_buckets=buckets,
        absolute_positions=absolute,
        num_heads=2 if buckets else 1,
        qk_width=3 if buckets else None,
    )
    for buckets, absolute in product((0, 7), (True, False))
}
_EXPERTS = MoEConfig(width=8, num_experts=4, hidden=6)
EXPERTS = {
    "sasrec-experts": replace(_SASREC, moe=_EXPERTS),
    "hstu-experts": replace(HSTUS["hstu-time7-absoluteTrue"], moe=_EXPERTS),
}
FEW = {
    name: (SASREC | HSTUS)[name]
    for name in (
        "sasrec-filter0.0-start",
        "sasrec-filter0.3-end",
        "hstu-time7-absoluteTrue",
        "hstu-time0-absoluteFalse",
    )
} | EXPERTS
HALVES = {f"{name}-bf16": replace(FEW[name], compute_dtype="bfloat16") for name in FEW}
EVERY = SASREC | HSTUS | HALVES


def build(config, seed=0):
    if isinstance(config, SASRecConfig):
        return SASRec(config, rngs=nnx.Rngs(seed))
    return HSTU(config, rngs=nnx.Rngs(seed))


def encoder(config):
    """The model's split parameters, and a jitted (params, batch) → hidden states in f32."""
    structure, params = nnx.split(build(config))
    return params, partial(encode, structure)


@partial(jax.jit, static_argnums=0)
def encode(structure, params, batch, key=None):
    """Hidden states in f32; models of one structure share the program."""
    return nnx.merge(structure, params).encode(batch, key=key).astype(jnp.float32)


def pack(sequences, *, num_tokens, num_sequences, seed=0):
    """A batch of item lists, in slots enough for later tokens; timestamps belong to the slots."""
    lengths = [len(items) for items in sequences]
    lengths += [0] * (num_sequences - len(sequences))
    items = np.zeros(num_tokens, np.int32)
    items[: sum(lengths)] = np.concatenate([np.asarray(s, np.int32) for s in sequences])
    gaps = np.random.default_rng(seed).integers(1, 5000, num_tokens)
    return JaggedBatch(
        item_ids=items,
        seq_offsets=np.cumsum([0, *lengths]).astype(np.int32),
        target_positions=np.arange(num_tokens, dtype=np.int32),
        target_ids=np.where(items, np.roll(items, -1), 0).astype(np.int32),
        timestamps=np.cumsum(gaps).astype(np.int32),
    )


def tolerance(config):
    return 2e-5 if config.compute_dtype == "float32" else 5e-2
