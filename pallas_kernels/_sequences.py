"""What must hold of packed sequences, raised where they are known and shown as NaN where not."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Bool, Int


def checked_offsets(
    op: str, seq_offsets: Int[jax.Array | np.ndarray, "B1"], *, num_tokens: int, max_len: int
) -> tuple[Int[jax.Array, "B1"], Bool[jax.Array, ""] | bool]:
    """The offsets, and whether they are sound; all 0, so that nothing is read, if they are not.

    Raises:
      ValueError: outside of `jax.jit`, where values are known: they do not begin at 0, decrease,
        end behind `num_tokens`, or a sequence is longer than `max_len`.
    """
    offsets = jnp.asarray(seq_offsets)
    if not isinstance(offsets, Tracer):
        if problem := offsets_problem(np.asarray(seq_offsets), num_tokens, max_len):
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
