"""Shape letters and aliases used across jaxrec.

B sequences in a batch, T packed tokens, L tokens of one sequence, D model width, H heads,
M training targets, V item vocabulary (row 0 is padding), N catalogue items, Q queries, K results.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

type PyTree = Any
type ArrayLike = jax.Array | np.ndarray
type Metrics = Mapping[str, float]

PADDING_ID = 0
"""Item id of padding: real items are numbered from 1."""
