"""The predicted bytes are those of a real index, within a tenth."""

import jax
import numpy as np
import pytest

from jaxrec.retrieval import ItemIndex
from jaxrec.retrieval.memory import index_bytes


def test_prediction_holds_for_a_real_index():
    rng = np.random.default_rng(0)
    num_items, width, nlist = 40_000, 16, 20
    features = {
        "language": rng.integers(0, 4, num_items),
        "tag": [list(row) for row in rng.integers(0, 5_000, (num_items, 6))],
    }
    vectors = rng.standard_normal((num_items, width)).astype(np.float32)
    index = ItemIndex.build(vectors, features, key=jax.random.key(0), nlist=nlist)
    ivf, bloom = index.ivf, index.bloom
    real = {
        "codes": ivf.codes.nbytes + ivf.scales.nbytes,
        "vectors": ivf.vectors.nbytes,
        "bloom": bloom.rows.nbytes + bloom.live.nbytes,
        "terms": bloom.term_values.nbytes + bloom.term_spans.nbytes,
        "ids": ivf.row_ids.nbytes + ivf.id_order.nbytes + ivf.live.nbytes,
        "centroids": ivf.centroids.nbytes + ivf.tile_offsets.nbytes,
    }
    predicted = index_bytes(
        num_items, width, nlist=nlist, head_values=4, tail_terms=6, terms=7
    )._asdict()
    for name, size in real.items():
        assert predicted[name] == pytest.approx(size, rel=0.1), name
