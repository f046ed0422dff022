"""Checksums of arrays, computed where the arrays live and the same however they are sharded."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import UInt32

from jaxrec.functional import leaf_names
from jaxrec.typing import PyTree

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def fingerprints(tree: PyTree) -> dict[str, list[Any]]:
    """[dtype, shape, checksum] of every leaf by its dotted name, ready for JSON.

    Any change within one 32-bit word changes the checksum; other damage goes unseen with a
    probability of 2⁻³². Nothing but the sums leaves the devices.

    Cost: reads every array once.
    """
    # Fetched one by one: several CPU devices deadlock once 32 programs with collectives wait.
    return {
        name: [str(leaf.dtype), list(leaf.shape), int(checksum(leaf))]
        for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)
    }


@jax.jit
def checksum(array: jax.Array) -> UInt32[jax.Array, ""]:
    """Sum of the words, each scrambled with its place, modulo 2³²."""
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize])
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        coordinate = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place += coordinate * jnp.uint32(stride) if size > 1 else 0
    # Scrambling is invertible, so no change of one word is lost.
    return _mixed(words.astype(jnp.uint32) ^ _mixed(place)).sum(dtype=jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3: every input bit reaches every output bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
