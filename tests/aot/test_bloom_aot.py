"""The Bloom kernel as the compiler sees it: registers, spills, vector loads, no scratch."""

import dataclasses
import functools

import jax
import pytest

from pallas_kernels.aot import aot_available, compile_for_h200
from pallas_kernels.bloom import BloomConfig
from pallas_kernels.bloom.workloads import WORKLOADS

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(aot_available() is not None, reason=str(aot_available())),
]
LEAF_SITES = 3  # a leaf is pushed, ANDed or ORed


@pytest.mark.parametrize(
    ("block_words", "max_registers", "width"), [(256, 48, 64), (512, 64, 128), (1024, 96, 128)]
)
def test_machine_code(block_words, max_registers, width):
    workload = WORKLOADS["10m_q64"]
    run = functools.partial(
        workload.run, backend="mosaic_gpu", config=BloomConfig(block_words=block_words)
    )
    report = compile_for_h200(run, *workload.shapes())
    assert "bloom_search_mosaic_gpu" in report.hlo_text
    assert report.temp_bytes < 100 * workload.num_queries, "a mask is copied"
    kernel = report.kernel("bloom_search_mosaic_gpu")
    assert kernel.registers <= max_registers
    assert kernel.spill_store_bytes == kernel.spill_load_bytes == kernel.stack_bytes == 0
    assert kernel.smem_bytes == BloomConfig(block_words).stack_bytes
    vectors = block_words * 4 // (width // 8) // 128  # loads of a row by each thread
    rows = LEAF_SITES * (1 + workload.num_hashes) * vectors
    assert kernel.count(f"LDG.E.{width}") >= rows
    pushes = 4  # HEAD, TAIL, ALL, NONE; the compiler may merge their stores
    assert 0 < kernel.count(f"STS.{width}") <= pushes * 2 * vectors
    assert kernel.count(f"LDS.{width}") == 2 * 2 * vectors, "AND and OR read both masks"
    assert kernel.count("BRX") == 1, "instructions are dispatched by one jump"
    assert kernel.count("BAR") <= 1, "no barrier inside the loop"


def test_tile_of_an_odd_number_of_words_a_thread():
    workload = dataclasses.replace(WORKLOADS["tiny"], bundle_words=384)
    run = functools.partial(workload.run, backend="mosaic_gpu", config=BloomConfig(384))
    kernel = compile_for_h200(run, *workload.shapes()).kernel("bloom_search_mosaic_gpu")
    assert kernel.spill_store_bytes == 0
    assert kernel.count("LDG.E") >= LEAF_SITES * (1 + workload.num_hashes) * 3


def test_no_name_means_the_kernel_on_an_h200():
    workload = WORKLOADS["tiny"]
    report = compile_for_h200(workload.run, *workload.shapes())
    assert report.kernel("bloom_search_mosaic_gpu")
    assert jax.default_backend() == "cpu"


@pytest.mark.parametrize(("tile_words", "max_registers"), [(128, 40), (512, 64)])
def test_machine_code_of_tiles(tile_words, max_registers):
    """The same loop, and scratch for nothing but the programs."""
    workload = WORKLOADS["10m_q64"]
    queries, tiles = 12 * workload.num_queries, 64
    shapes = (
        *workload.shapes(),
        jax.ShapeDtypeStruct((queries,), jax.numpy.int32),
        jax.ShapeDtypeStruct((queries, tiles), jax.numpy.int32),
    )
    run = functools.partial(workload.run, backend="mosaic_gpu", tile_words=tile_words)
    report = compile_for_h200(run, *shapes)
    assert report.temp_bytes < 100 * workload.num_queries, "a mask is copied"
    kernel = report.kernel("bloom_search_tiles_mosaic_gpu")
    assert kernel.registers <= max_registers
    assert kernel.spill_store_bytes == kernel.spill_load_bytes == kernel.stack_bytes == 0
    assert kernel.count("BRX") == 1
    assert kernel.count("BAR") <= 1


@pytest.mark.slow
def test_reference_is_bounded_in_memory():
    workload = WORKLOADS["10m_q64"]
    run = functools.partial(workload.run, backend="xla")
    report = compile_for_h200(run, *workload.shapes())
    mask_bytes = workload.num_queries * workload.num_bundles * workload.bundle_words * 4
    assert report.temp_bytes < 4 * mask_bytes
    assert not any("mosaic" in kernel.name for kernel in report.kernels)
