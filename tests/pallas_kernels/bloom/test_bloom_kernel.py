"""The kernel against the reference: simulated with race detection, and compiled on a GPU."""

import jax
import numpy as np
import pytest
from bloom_cases import random_catalogue, random_programs

from pallas_kernels._testing import simulate
from pallas_kernels.bloom import MAX_DEPTH, BloomConfig, BloomOp, bloom_search, ref
from pallas_kernels.bloom.config import heuristic, kernel_problem, search_space
from pallas_kernels.bloom.workloads import WORKLOADS

TARGET = "pallas_kernels.bloom.mosaic_gpu:bloom_search"
SIMULATED = [
    # bundle words, tile words, head rows, hashes, steps
    (128, 128, 3, 2, 9),
    (256, 128, 0, 3, 6),
    (256, 256, 2, 1, 1),
    (512, 512, 1, 2, 2 * MAX_DEPTH - 1),
]


def case(bundle_words, num_head, num_hashes, num_steps, *, bundles=2, num_queries=3, seed=0):
    rng = np.random.default_rng(seed)
    num_items = (bundles * bundle_words - 7) * 32 + 5  # ends inside a word, inside a bundle
    catalogue = random_catalogue(
        rng,
        num_items=num_items,
        bundle_words=bundle_words,
        num_head=num_head,
        num_hashes=num_hashes,
    )
    opcodes, operands, _ = random_programs(
        rng, catalogue, num_queries=num_queries, num_steps=num_steps
    )
    if num_steps == 2 * MAX_DEPTH - 1:  # the deepest stack that is allowed
        opcodes[0] = [BloomOp.TAIL] * MAX_DEPTH + [BloomOp.OR] * (MAX_DEPTH - 1)
    arrays = (catalogue.rows, catalogue.row_offsets, opcodes, operands)
    return arrays, {"num_head": num_head, "num_items": num_items}


def test_simulated_kernel_equals_reference_without_races():
    cases = []
    for bundle_words, tile, num_head, num_hashes, num_steps in SIMULATED:
        arrays, static = case(bundle_words, num_head, num_hashes, num_steps)
        cases.append((arrays, static | {"config": BloomConfig(tile)}))
    for (arrays, options), got in zip(cases, simulate(TARGET, cases), strict=True):
        static = {name: options[name] for name in ("num_head", "num_items")}
        want = ref.bloom_search(*map(jax.numpy.asarray, arrays), **static)
        for mask, expected in zip(got, want, strict=True):
            np.testing.assert_array_equal(mask, expected)


TILED = [
    # bundle words, tile words, block words, head rows, hashes, steps
    (128, 128, 128, 3, 2, 9),
    (512, 256, 128, 2, 3, 6),
]


def tiled_case(bundle_words, tile_words, num_head, num_hashes, num_steps, **sizes):
    arrays, static = case(bundle_words, num_head, num_hashes, num_steps, **sizes)
    rng = np.random.default_rng(9)
    num_tiles = (len(arrays[1]) - 1) * (bundle_words // tile_words)
    programs = rng.integers(0, len(arrays[2]), 5).astype(np.int32)
    tiles = rng.integers(-1, num_tiles, (5, 3)).astype(np.int32)
    return (*arrays, programs, tiles), static | {"tile_words": tile_words}


def test_simulated_kernel_on_tiles_equals_reference_without_races():
    cases = []
    for bundle_words, tile_words, block_words, *rest in TILED:
        arrays, static = tiled_case(bundle_words, tile_words, *rest)
        cases.append((arrays, static | {"config": BloomConfig(block_words)}))
    arrays, static = cases[0]  # tiles and programs that do not exist: nonsense, but no crash
    wrong = (*arrays[:4], np.full(5, 77, np.int32), np.full((5, 3), 1 << 30, np.int32))
    *results, _ = simulate(TARGET + "_tiles", [*cases, (wrong, static)])
    for (arrays, options), got in zip(cases, results, strict=True):
        static = {name: value for name, value in options.items() if name != "config"}
        want = ref.bloom_search_tiles(*map(jax.numpy.asarray, arrays), **static)
        for mask, expected in zip(got, want, strict=True):
            np.testing.assert_array_equal(mask, expected)


def test_wrong_programs_stay_inside_the_arrays():
    """Underflow, overflow, unknown opcodes and rows: nonsense, but neither a crash nor a race."""
    arrays, static = case(128, 2, 2, 12)
    opcodes = np.array([[3] * 12, [1] * 12, [99, -5] * 6], np.int32)
    operands = np.full((3, 12, 2), 2**32 - 1, np.uint32)
    cases = [((*arrays[:2], opcodes, operands), static | {"config": BloomConfig(128)})]
    [(possibly, surely)] = simulate(TARGET, cases)
    assert possibly.shape == surely.shape == (3, 256)


@pytest.mark.parametrize(
    ("rows", "bundles", "tile", "problem"),
    [
        ((10, 100), 1, 128, "bundles of 100 words"),
        ((10, 384), 1, 256, "block_words=256"),
        ((10, 2048), 1, 2048, "up to 1024"),
        ((10, 128), 1, 0, "block_words=0"),
        ((0, 128), 1, 128, "without rows"),
        ((10, 256), 40_000, 128, "more than 65535 blocks"),
    ],
)
def test_unsupported_shapes_are_explained(rows, bundles, tile, problem):
    assert problem in (kernel_problem(rows, bundles, 2, BloomConfig(tile)) or "")


@pytest.mark.parametrize("bundle_words", [128, 256, 384, 512, 640, 1024])
def test_heuristic_and_search_space_are_supported(bundle_words):
    for config in [heuristic(bundle_words), *search_space(bundle_words)]:
        assert kernel_problem((10, bundle_words), 3, 2, config) is None


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
class TestOnGpu:
    @pytest.mark.parametrize("shape", SIMULATED)
    @pytest.mark.parametrize("seed", range(3))
    def test_random_programs(self, shape, seed):
        bundle_words, tile, num_head, num_hashes, num_steps = shape
        arrays, static = case(
            bundle_words, num_head, num_hashes, num_steps, bundles=9, num_queries=33, seed=seed
        )
        got = bloom_search(*arrays, **static, backend="mosaic_gpu", config=BloomConfig(tile))
        want = bloom_search(*arrays, **static, backend="xla")
        for mask, expected in zip(got, want, strict=True):
            np.testing.assert_array_equal(mask, expected)

    @pytest.mark.parametrize("shape", TILED)
    def test_tiles(self, shape):
        bundle_words, tile_words, block_words, *rest = shape
        arrays, static = tiled_case(bundle_words, tile_words, *rest, bundles=9, num_queries=33)
        config = BloomConfig(block_words)
        got = bloom_search(*arrays, **static, backend="mosaic_gpu", config=config)
        want = bloom_search(*arrays, **static, backend="xla")
        for mask, expected in zip(got, want, strict=True):
            np.testing.assert_array_equal(mask, expected)

    def test_workload_runs_the_kernel(self):
        workload = WORKLOADS["1m_q64"]
        arrays = [jax.device_put(array) for array in workload.arrays(0)]
        compiled = jax.jit(workload.run).lower(*arrays).compile()
        assert "bloom_search_mosaic_gpu" in (compiled.as_text() or "")
        for mask, expected in zip(
            compiled(*arrays), workload.run(*arrays, backend="xla"), strict=True
        ):
            np.testing.assert_array_equal(mask, expected)
