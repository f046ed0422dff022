"""What must hold of packed sequences, raised where they are known and shown as NaN where not."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Bool, Int


def checked_offsets(
    op: str,
    seq_offsets: Int[jax.Array | np.ndarray, "B1"],
    *,
    num_tokens: int,
    max_len: int,
    start_multiple: int = 1,
) -> tuple[Int[jax.Array, "B1"], Bool[jax.Array, ""] | bool]:
    """The offsets, and whether they are sound; all 0, so that nothing is read, if they are not.

    Raises:
      ValueError: outside of `jax.jit`, where values are known: they do not begin at 0, decrease,
        end behind `num_tokens`, a sequence is longer than `max_len`, or one starts elsewhere than
        at the multiples that were promised.
    """
    offsets = jnp.asarray(seq_offsets)
    if not isinstance(offsets, Tracer):
        known = np.asarray(seq_offsets)
        problem = offsets_problem(known, num_tokens, max_len) or unaligned(known, start_multiple)
        if problem:
            raise ValueError(f"{op}: {problem}")
        return offsets, True
    lengths = jnp.diff(offsets)
    sound = jnp.all((lengths >= 0) & (lengths <= max_len))
    sound &= jnp.all(offsets[:1] == 0) & jnp.all(offsets[-1:] <= num_tokens)
    return jnp.where(sound, offsets, 0), sound


def offsets_problem(offsets: np.ndarray, num_tokens: int, max_len: int) -> str | None:
    """What is wrong with them and what to do, if something is."""
    if not offsets.size:
        return None
    if offsets[0] != 0:
        return f"seq_offsets begin at {offsets[0]}; expected 0, then the running sum of lengths"
    lengths = np.diff(offsets)
    if (lengths < 0).any():
        n = int(np.argmax(lengths < 0))
        return (
            f"seq_offsets decrease from {offsets[n]} to {offsets[n + 1]} at number {n + 1}; "
            "expected the running sum of lengths"
        )
    if offsets[-1] > num_tokens:
        return f"seq_offsets end at {offsets[-1]}, but there are {num_tokens} token slots"
    if (lengths > max_len).any():
        n = int(np.argmax(lengths > max_len))
        return (
            f"sequence {n} has {lengths[n]} tokens, more than max_len={max_len}; raise max_len, or "
            "keep the sequence's last tokens"
        )
    return None


def unaligned(offsets: np.ndarray, start_multiple: int) -> str | None:
    """Which sequence does not start at a multiple of so many slots, if one does not."""
    astray = offsets[:-1] % start_multiple
    if not astray.any():
        return None
    n = int(np.argmax(astray > 0))
    return (
        f"sequence {n} starts at slot {offsets[n]}, and aligned sequences start at multiples of "
        f"{start_multiple}: have lengths that are multiples too, or leave aligned=True out, and "
        "copies are aligned"
    )
