"""Seeded k-means on the device: the centroids of an inverted file."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, Key

_CHUNK = 8192

type _Array = jax.Array | np.ndarray


def kmeans(
    key: Key[Array, ""],
    points: Float[_Array, "N D"],
    num_clusters: int,
    *,
    iterations: int = 12,
    spherical: bool = False,
    sample_per_cluster: int = 128,
) -> Float32[Array, "{num_clusters} D"]:
    """Centroids of Lloyd's algorithm, started at distinct random points.

    Args:
      key: the only source of randomness; the same key gives the same centroids.
      points: what to cluster.
      num_clusters: C, at most N.
      iterations: Lloyd steps.
      spherical: normalise points and centroids, so that clusters gather directions.
      sample_per_cluster: at most this many points a cluster are used, drawn without replacement.

    A cluster that ends a step empty restarts at one of the points farthest from their centroids.

    Cost: iterations · 4·n·C·D operations on n = min(N, C · sample_per_cluster) points; 8192 · C
    distances exist at a time.
    """
    size = min(len(points), num_clusters * sample_per_cluster)
    return _lloyd(key, jnp.asarray(points), size, num_clusters, iterations, spherical)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _lloyd(key, points, size: int, num_clusters: int, iterations: int, spherical: bool):
    sample_key, start_key = jax.random.split(key)
    if size < len(points):
        points = points[jax.random.choice(sample_key, len(points), (size,), replace=False)]
    points = points.astype(jnp.float32)
    if spherical:
        points = normalise(points)
    start = jax.random.choice(start_key, size, (num_clusters,), replace=False)

    def step(centroids, _):
        _, sums, counts, distances = _assign_and_sum(points, centroids)
        moved = sums / jnp.maximum(counts, 1)[:, None]
        empty = counts == 0
        farthest = lax.top_k(distances, num_clusters)[1]
        restart = points[farthest[jnp.cumsum(empty) - 1]]
        moved = jnp.where(empty[:, None], restart, moved)
        return (normalise(moved) if spherical else moved), None

    return lax.scan(step, points[start], None, length=iterations)[0]


def normalise(x: Float[Array, "N D"]) -> Float32[Array, "N D"]:
    """Rows of length 1; rows of zeros stay."""
    x = x.astype(jnp.float32)
    norms = jnp.linalg.norm(x, axis=1, keepdims=True)
    return x / jnp.where(norms > 0, norms, 1)


@jax.jit
def assign(points: Float[_Array, "N D"], centroids: Float[_Array, "C D"]) -> Int32[Array, "N"]:
    """The nearest centroid (least squared distance) of each point."""
    chunks, num_points = _chunked(jnp.asarray(points, jnp.float32))
    clusters = lax.map(lambda chunk: _nearest(chunk, jnp.asarray(centroids))[0], chunks)
    return clusters.reshape(-1)[:num_points]


def _chunked(points):
    num_points, width = points.shape
    chunk = min(_CHUNK, num_points)
    num_chunks = -(-num_points // chunk)
    padded = jnp.pad(points, ((0, num_chunks * chunk - num_points), (0, 0)))
    return padded.reshape(num_chunks, chunk, width), num_points


def _nearest(points, centroids):
    """(nearest cluster, squared distance) of each point."""
    products = jnp.matmul(points, centroids.T, precision=lax.Precision.HIGHEST)
    distances = jnp.sum(centroids**2, axis=1) - 2 * products
    clusters = jnp.argmin(distances, axis=1).astype(jnp.int32)
    return clusters, jnp.min(distances, axis=1) + jnp.sum(points**2, axis=1)


def _assign_and_sum(points, centroids):
    """Clusters of all points, sums and counts of all clusters.

    The sums are products with a one-hot matrix and not a scatter, whose order of additions, and so
    the last bits of the result, would change from run to run on a GPU.
    """
    num_clusters = centroids.shape[0]
    chunks, num_points = _chunked(points)
    valid = (jnp.arange(chunks.shape[0] * chunks.shape[1]) < num_points).reshape(chunks.shape[:2])

    def step(totals, chunk):
        members, real = chunk
        clusters, distances = _nearest(members, centroids)
        onehot = jax.nn.one_hot(clusters, num_clusters) * real[:, None]
        sums = totals[0] + jnp.matmul(onehot.T, members, precision=lax.Precision.HIGHEST)
        counts = totals[1] + jnp.sum(onehot, axis=0)
        return (sums, counts), (clusters, distances)

    zeros = (jnp.zeros_like(centroids), jnp.zeros(num_clusters, jnp.float32))
    (sums, counts), (clusters, distances) = lax.scan(step, zeros, (chunks, valid))
    return clusters.reshape(-1)[:num_points], sums, counts, distances.reshape(-1)[:num_points]
