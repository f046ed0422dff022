"""Parts of the tokens, one after the other, so that what a part needs is soon free again."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


class Chunks(NamedTuple):
    """Results for parts of the tokens: those of the equal parts stacked, and of what remains."""

    equal: Any
    rest: Any


def map_chunks(
    fn: Callable[..., tuple[Any, Any]],
    carry: Any,
    arrays: tuple[Array, ...],
    chunk_tokens: int | None,
    chunks: Chunks | None = None,
) -> tuple[Any, Chunks]:
    """(carry, results) of fn(carry, (*part of the arrays, its chunk)), part after part.

    Args:
      fn: what to do with a part.
      carry: handed from part to part.
      arrays: each with T tokens along its first axis.
      chunk_tokens: tokens of a part; None takes all at once.
      chunks: results of an earlier pass over the same parts, if wanted.
    """
    chunks = chunks or Chunks(None, None)
    num_tokens = arrays[0].shape[0]
    size = min(chunk_tokens or num_tokens, num_tokens)
    count, rest = divmod(num_tokens, size)
    if count == 1 and rest == 0:
        carry, results = fn(carry, (*arrays, chunks.rest))
        return carry, Chunks(None, results)
    parts = [a[: count * size].reshape(count, size, *a.shape[1:]) for a in arrays]
    carry, equal = lax.scan(fn, carry, (*parts, chunks.equal))
    if rest == 0:
        return carry, Chunks(equal, None)
    carry, results = fn(carry, (*(a[count * size :] for a in arrays), chunks.rest))
    return carry, Chunks(equal, results)


def join_chunks(chunks: Chunks) -> Any:
    """The results of all tokens, which lie along the first axis."""
    if chunks.equal is None:
        return chunks.rest
    equal = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), chunks.equal)
    if chunks.rest is None:
        return equal
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), equal, chunks.rest)
