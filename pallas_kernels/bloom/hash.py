"""64-bit hashing of terms: NumPy's uint64 on the host, pairs of uint32 on the device.

JAX has no uint64 by default, so there a 64-bit number is (low, high) in two uint32. Both give the
same bits.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt32, UInt64

GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_LOW = 0xFFFFFFFF

type _Pair = tuple[jax.Array, jax.Array]


def mix64(x: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """The finaliser of splitmix64, a Murmur mix: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FACTORS[0])
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_FACTORS[1])
    return x ^ (x >> np.uint64(31))


def row_hashes(
    terms: UInt32[jax.Array | np.ndarray, "*shape 2"], num_hashes: int
) -> UInt32[jax.Array | np.ndarray, "*shape {num_hashes}"]:
    """The K numbers that select a term's Bloom rows, all derived from its 64 bits.

        hash_k = high half of mix64(term + (k + 1)·GOLDEN mod 2^64)

    Args:
      terms: 64-bit hashes as (low, high). A JAX array is hashed where it lies, and can be traced;
        a NumPy array on the host, with the same result.
      num_hashes: K.

    Cost: two 64-bit multiplications a number, on the device 6 of 32 bits each.
    """
    if isinstance(terms, np.ndarray):
        whole = np.ascontiguousarray(terms).view("<u8")
        steps = np.arange(1, num_hashes + 1, dtype=np.uint64) * np.uint64(GOLDEN)
        return (mix64(whole + steps) >> np.uint64(32)).astype(np.uint32)
    columns = [row_hash(terms, step) for step in hash_steps(num_hashes)]
    return jnp.stack(columns, axis=-1)


def hash_steps(num_hashes: int) -> UInt32[np.ndarray, "{num_hashes} 2"]:
    """What is added to a term before it is mixed, for each of its K numbers: (low, high)."""
    steps = np.arange(1, num_hashes + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return steps.view("<u4").reshape(-1, 2)


def row_hash(
    terms: UInt32[jax.Array, "*shape 2"], step: UInt32[jax.Array | np.ndarray, "2"]
) -> UInt32[jax.Array, "*shape"]:
    """One of the K numbers of `row_hashes`, by its step, which may be traced."""
    return _mix(_add((terms[..., 0], terms[..., 1]), step))[1]


def _mix(x: _Pair) -> _Pair:
    """`mix64` on (low, high)."""
    x = _multiply(_xor_shifted(x, 30), _FACTORS[0])
    x = _multiply(_xor_shifted(x, 27), _FACTORS[1])
    return _xor_shifted(x, 31)


def _add(x: _Pair, step: jax.Array | np.ndarray) -> _Pair:
    low = x[0] + step[0]
    return low, x[1] + step[1] + (low < x[0]).astype(jnp.uint32)


def _xor_shifted(x: _Pair, shift: int) -> _Pair:
    """x ^ (x >> shift) for a shift of 1 to 31."""
    low, high = x
    return low ^ (low >> shift | high << (32 - shift)), high ^ (high >> shift)


def _multiply(x: _Pair, constant: int) -> _Pair:
    """The low 64 bits of the product."""
    low, high = x
    factor_low, factor_high = jnp.uint32(constant & _LOW), jnp.uint32(constant >> 32)
    product_low, product_high = _wide_product(low, factor_low)
    return product_low, product_high + low * factor_high + high * factor_low


def _wide_product(a: jax.Array, b: jax.Array) -> _Pair:
    """All 64 bits of a product of 32-bit numbers, by halves of 16 bits."""
    mask = jnp.uint32(0xFFFF)
    a0, a1, b0, b1 = a & mask, a >> 16, b & mask, b >> 16
    low = a0 * b0
    middle = a1 * b0 + (low >> 16)
    other = a0 * b1 + (middle & mask)
    return a * b, a1 * b1 + (middle >> 16) + (other >> 16)
