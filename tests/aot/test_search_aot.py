"""A whole filtered search over ten million items, as it is compiled for an H200."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from experiments.bench_codesign import SCANNED, Case
from jaxrec.retrieval import ItemIndex
from pallas_kernels.aot import aot_available, compile_for_h200
from pallas_kernels.ivf.workloads import WORKLOADS

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(aot_available() is not None, reason=str(aot_available())),
]
WIDTH, K, QUERIES, MB = 128, 100, 16, 1e6


def large_index(small: ItemIndex) -> ItemIndex:
    """`small` with the shapes of ten million items; arrays of one zero take no memory."""
    offsets = WORKLOADS["10m_128"].tile_offsets()
    lists, rows = len(offsets) - 1, 64 * int(offsets[-1])
    bundle_rows, words = small.bloom.rows.shape[0] // 3, small.bloom.rows.shape[1]
    bundles = -(-rows // (32 * words))

    def shape(shape, dtype):
        return np.broadcast_to(np.zeros((), dtype), shape)

    ivf = replace(
        small.ivf,
        centroids=shape((lists, WIDTH), jnp.float32),
        codes=shape((rows, WIDTH), jnp.int8),
        scales=shape((rows,), jnp.float32),
        vectors=shape((rows, WIDTH), jnp.float32),
        row_ids=shape((rows,), jnp.int32),
        id_order=shape((rows,), jnp.int32),
        live=shape((rows // 32,), jnp.uint32),
        tile_offsets=shape(offsets.shape, jnp.int32),
        error_bounds=shape((2,), jnp.float32),
        num_items=10_000_000,
        list_tiles=np.diff(offsets).astype(np.int32).tobytes(),
    )
    bloom = replace(
        small.bloom,
        rows=shape((bundle_rows * bundles, words), jnp.uint32),
        row_offsets=shape((bundles + 1,), jnp.int32),
        live=shape((rows // 32,), jnp.uint32),
        term_spans=shape((rows, 2), jnp.int32),
        term_values=shape((4 * rows,), jnp.int32),
        terms_used=shape((), jnp.int32),
        num_items=rows,
    )
    return replace(small, ivf=ivf, bloom=bloom)


def test_ten_million_items_take_little_beside_the_index(monkeypatch):
    numbers, rng = np.arange(8_192), np.random.default_rng(0)
    features = {"language": numbers % 5, "topic": [[i % 500, i * 7 % 500] for i in numbers]}
    vectors = rng.normal(size=(len(numbers), WIDTH)).astype(np.float32)
    small = ItemIndex.build(vectors, features, key=jax.random.key(0), nlist=16)
    plan = small.compile(["language:1 AND NOT topic:7"])
    queries = jax.ShapeDtypeStruct((1, QUERIES, WIDTH), jnp.float32)

    def search(index, queries, plan):
        return index.search(queries, plan, k=K)

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # of shapes, not arrays
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (large_index(small), queries, plan)
    )
    report = compile_for_h200(search, *shapes)
    print(f"temp memory {report.temp_bytes / MB:.1f} MB")
    assert report.temp_bytes < 64 * MB
    assert "ivf_scan_mosaic_gpu" in report.hlo_text
    assert "bloom_search_mosaic_gpu" in report.hlo_text
    assert not re.findall(r"callback|infeed|outfeed|= \S+ send\(|= \S+ recv\(", report.hlo_text)


@pytest.mark.parametrize("probed", [True, False])
def test_filter_and_scan_of_twenty_million_items(probed):
    """SilverTorch's end-to-end case, as `experiments.bench_codesign` runs it."""
    case = Case(WORKLOADS["20m_128"])
    ivf = dict(zip(SCANNED, case.ivf.shapes(), strict=False))
    report = compile_for_h200(
        functools.partial(case.search, probed=probed), case.bloom.shapes(), ivf
    )
    print(f"temp memory {report.temp_bytes / MB:.1f} MB")
    masks = case.ivf.num_queries * case.bloom.num_items / 8
    assert report.temp_bytes < 64 * MB + (1 if probed else 3) * masks
    kernel = "bloom_search_tiles" if probed else "bloom_search"
    for name in (kernel, "ivf_scan"):
        assert f"{name}_mosaic_gpu" in report.hlo_text
