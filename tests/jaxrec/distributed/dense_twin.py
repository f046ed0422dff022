"""A recommender small enough for tests, and its training with dense tables in one place.

The twin's row updates are written out in NumPy's float64, row by row.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.distributed import EmbeddingTable, Feature, RowAdagrad, RowAdam, RowSGD

OPTIMIZERS = {
    "sgd": RowSGD(0.1),
    "adagrad": RowAdagrad(0.1, initial=0.01),
    "adam": RowAdam(0.02),
}


def two_tables(optimizer, *, rows=(40, 23), dim=4, **options: Any) -> list[EmbeddingTable]:
    """Alike, so one group; padding is id 0."""
    return [
        EmbeddingTable("items", rows[0], dim, optimizer, std=0.5, **options),
        EmbeddingTable("users", rows[1], dim, optimizer, std=0.5, **options),
    ]


FEATURES = {
    "history": Feature("items", "mean"),
    "item": Feature("items"),
    "user": Feature("users"),
}


def dense_params(dim=4, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "mix": jnp.asarray(rng.standard_normal((dim, dim)), jnp.float32),
        "bias": jnp.zeros((), jnp.float32),
    }


def pair_loss(params, embeddings, batch):
    """Logistic loss of (user + history) · item; predictions beside."""
    user = embeddings["user"] + embeddings["history"]
    score = jnp.sum(jnp.tanh(user @ params["mix"]) * embeddings["item"], axis=-1) + params["bias"]
    loss = jnp.mean(jnp.logaddexp(0, score) - batch * score)
    return loss, score


def random_batch(rng, size=16, length=5, rows=(40, 23), pick=None):
    """Ids with duplicates and padding (popular ones come often), and labels."""

    def draw(count, shape):
        ids = np.minimum(rng.geometric(3.0 / count, shape), count) - 1
        return ids.astype(np.int32) if pick is None else pick(count, shape)

    ids = {
        "history": draw(rows[0], (size, length)),
        "item": draw(rows[0], (size,)),
        "user": draw(rows[1], (size,)),
    }
    return ids, rng.integers(0, 2, size).astype(np.float32)


def _loss(params, tables, ids, batch):
    found = {}
    for name, feature in FEATURES.items():
        table = tables[feature.table]
        good = (ids[name] > 0) & (ids[name] < table.shape[0])
        rows = jnp.where(good[..., None], table[jnp.where(good, ids[name], 0)], 0)
        if feature.pooling is not None:
            rows = rows.sum(1) / jnp.maximum(good.sum(1)[:, None], 1)
        found[name] = rows
    return pair_loss(params, found, batch)


_gradient = jax.jit(jax.value_and_grad(_loss, argnums=(0, 1), has_aux=True))


class DenseTwin:
    """The same training with whole tables on one device."""

    def __init__(self, tables, optimizer, params):
        self.values = {name: np.asarray(value, np.float64) for name, value in tables.items()}
        self.optimizer, self.params = optimizer, params
        self.moments = {name: {} for name in tables}

    def step(self, ids, batch, rate=0.05):
        """Plain SGD of the dense weights; rows looked up by their optimizer. Gives (loss, aux)."""
        tables = {name: jnp.asarray(value, jnp.float32) for name, value in self.values.items()}
        (value, aux), (d_params, d_tables) = _gradient(self.params, tables, ids, batch)
        self.params = jax.tree.map(lambda p, d: p - rate * d, self.params, d_params)
        for name in self.values:
            used = [ids[f].ravel() for f, feature in FEATURES.items() if feature.table == name]
            for row in np.unique(np.concatenate(used)):
                if 0 < row < len(self.values[name]):
                    self._update(name, int(row), np.asarray(d_tables[name][row], np.float64))
        return float(value), np.asarray(aux)

    def _update(self, name, row, grad):
        optimizer, value = self.optimizer, self.values[name]
        if isinstance(optimizer, RowSGD):
            value[row] -= optimizer.learning_rate * grad
        elif isinstance(optimizer, RowAdagrad):
            total = self.moments[name].get(row, optimizer.initial) + np.mean(grad**2)
            self.moments[name][row] = total
            value[row] -= optimizer.learning_rate * grad / (np.sqrt(total) + optimizer.eps)
        else:
            first, second, count = self.moments[name].get(row, (0.0, 0.0, 0))
            count += 1
            first = optimizer.b1 * first + (1 - optimizer.b1) * grad
            second = optimizer.b2 * second + (1 - optimizer.b2) * grad**2
            self.moments[name][row] = (first, second, count)
            step = first / (1 - optimizer.b1**count)
            scale = np.sqrt(second / (1 - optimizer.b2**count)) + optimizer.eps
            value[row] -= optimizer.learning_rate * step / scale
