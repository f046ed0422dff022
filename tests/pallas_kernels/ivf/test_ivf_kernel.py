"""The kernel against the reference: simulated with race detection, and compiled on a GPU."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BackendError, ivf_search, probed_tiles_bound
from pallas_kernels._testing import simulate
from pallas_kernels.ivf import IvfConfig, IvfKernelConfig, search
from pallas_kernels.ivf.config import (
    BLOCK_QUERIES,
    MAX_K,
    kernel_heuristic,
    kernel_problem,
    max_slots,
    search_space,
)
from pallas_kernels.ivf.workloads import WORKLOADS, IvfWorkload

TARGET = "pallas_kernels.ivf.search:ivf_search"
NAMES = [
    *("queries", "centroids", "codes", "scales", "tile_offsets"),
    *("live", "mask", "mask_of_query", "probes"),
]
SMALL = IvfWorkload(1_000, 32, 5, 2, 10, 3, 0.5)  # 36 words of masks, which 16 tiles read in place
SHARED = IvfKernelConfig(8, 16, 4, 2, share=True)
OWN = IvfKernelConfig(8, 16, 4, 3)


def bits(words):
    return np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little").astype(bool)


def case(workload, config, *, k=None, nprobe=None, seed=0, **changes: Any):
    """(arrays by name, static arguments) of one search."""
    arrays = workload.arrays(seed) | {"mask_of_query": None, "probes": None} | changes
    nprobe = nprobe or workload.nprobe
    bound, of_list = (probed_tiles_bound(arrays["tile_offsets"], n) for n in (nprobe, 1))
    options = {"nprobe": nprobe, "max_tiles": bound, "max_list_tiles": of_list, "config": config}
    return arrays, options | {"k": k or workload.k}


def run_xla(arrays, options):
    named = {name: arrays[name] for name in ("mask_of_query", "probes")}
    positional = [arrays[name] for name in NAMES[:7]]
    return ivf_search(*positional, **named, **options | {"config": None}, backend="xla")


def check(got, arrays, options):
    """Where the kernel says so, the best there are; everywhere, eligible rows and their scores."""
    scores, rows, complete = map(np.asarray, got)
    want = run_xla(arrays, options)
    wanted = np.asarray(want.scores)
    np.testing.assert_array_equal(scores[complete], wanted[complete])
    assert (scores <= wanted).all()
    eligible = np.broadcast_to(bits(arrays["live"]), (len(rows), len(arrays["codes"])))
    if arrays["mask"] is not None:
        owner = arrays["mask_of_query"]
        eligible = eligible & bits(arrays["mask"] if owner is None else arrays["mask"][owner])
    everything = run_xla(arrays, options | {"k": min(len(arrays["codes"]), MAX_K)})
    for query, (own_scores, own_rows) in enumerate(zip(scores, rows, strict=True)):
        assert (np.diff(own_scores[np.isfinite(own_scores)]) <= 0).all()
        found = own_rows[own_rows >= 0]
        assert len(set(found)) == len(found)
        assert eligible[query, found].all()
        np.testing.assert_array_equal(own_rows >= 0, np.isfinite(own_scores))
        all_rows = np.asarray(everything.rows)[query]
        of_row = dict(zip(all_rows, np.asarray(everything.scores)[query], strict=True))
        np.testing.assert_array_equal([of_row[row] for row in found], own_scores[own_rows >= 0])
    return complete


def simulate_and_check(cases, timeout_s=240):
    calls = [(tuple(arrays[name] for name in NAMES), options) for arrays, options in cases]
    results = simulate(TARGET, calls, timeout_s=timeout_s)
    return [check(got, *asked) for got, asked in zip(results, cases, strict=True)]


def without_three(arrays):
    """Tile offsets of the same rows with lists 0, 3 and the last one empty."""
    offsets = arrays["tile_offsets"].copy()
    offsets[1] = 0
    offsets[3] = offsets[4]
    offsets[-2] = offsets[-1]
    return offsets


@pytest.mark.slow
@pytest.mark.parametrize("config", [SHARED, OWN], ids=["list-major", "query-major"])
def test_simulated_kernel_equals_reference_without_races(config):
    arrays, heads = SMALL.arrays(0), np.array([1, 1, 0], np.int32)
    cases = [
        case(SMALL, config),
        case(SMALL, config, nprobe=4, tile_offsets=without_three(arrays), mask_of_query=heads),
        case(SMALL, config, nprobe=3, k=800, mask=None),  # more than there are
        case(SMALL, config, mask=np.zeros_like(arrays["mask"])),
        case(SMALL, config, nprobe=5, probes=np.array([0, 1, 5], np.int32)),
        case(dataclasses.replace(SMALL, num_rows=300), config),  # too few words
    ]
    complete = simulate_and_check(cases)
    assert complete[3].all()
    assert complete[4][0], "no list, no row, and that is certain"


@pytest.mark.parametrize(
    ("width", "config"),
    [
        (64, IvfKernelConfig(16, 16, 8, 4, share=True)),
        (128, IvfKernelConfig(8, 32, 16, 2)),
        (96, IvfKernelConfig(64, 16, 2, 3, share=True)),
        (256, IvfKernelConfig(32, 16, 1, 2, share=True)),
    ],
)
@pytest.mark.slow
def test_simulated_widths_and_blocks(width, config):
    workload = dataclasses.replace(SMALL, width=width)
    long = dataclasses.replace(workload, num_rows=2_600, num_lists=2, num_queries=2)  # two slots
    simulate_and_check([case(workload, config, nprobe=3), case(long, config, nprobe=1)])


@pytest.mark.slow
def test_every_list_probed():
    """All rows dealt out, in one part and in several; queries that do not fill their blocks."""
    cut = dataclasses.replace(SHARED, max_scratch_bytes=3 * 4 * 1024)
    many = dataclasses.replace(SMALL, num_queries=9)
    cases = [
        case(SMALL, SHARED, nprobe=5),
        case(SMALL, OWN, nprobe=5),
        case(SMALL, cut, nprobe=5, k=200),
        case(many, SHARED, nprobe=5),
    ]
    simulate_and_check(cases)


@pytest.mark.slow
def test_groups_of_queries_do_not_change_the_result():
    cut = dataclasses.replace(OWN, max_scratch_bytes=4 * 4 * 1024)
    cases = [case(SMALL, OWN), case(SMALL, cut)]
    calls = [(tuple(arrays[name] for name in NAMES), options) for arrays, options in cases]
    whole, grouped = simulate(TARGET, calls, timeout_s=240)
    for one, other in zip(whole, grouped, strict=True):
        np.testing.assert_array_equal(one, other)


def one_lane(num_best):
    """One list of 16 tiles in which the best rows all lie in lane 5."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-20, 21, (1024, 32), dtype=np.int8)
    codes[5 : 5 + 64 * num_best : 64] = 100
    arrays = {
        "queries": np.ones((2, 32), np.float32),
        "centroids": np.ones((2, 32), np.float32),
        "codes": codes,
        "scales": np.linspace(1, 2, 1024, dtype=np.float32),
        "tile_offsets": np.array([0, 16, 16], np.int32),
        "live": np.full(32, 2**32 - 1, np.uint32),
        "mask": None,
        "mask_of_query": None,
        "probes": None,
    }
    return arrays, {"k": 6, "nprobe": 1, "max_tiles": 16, "max_list_tiles": 16}


def test_certificate_tells_an_overflowing_lane():
    arrays, options = one_lane(num_best=6)
    tied = arrays | {"codes": np.full_like(arrays["codes"], 3), "scales": np.ones(1024, np.float32)}
    four, eight = (options | {"config": IvfKernelConfig(8, 16, kept, 2)} for kept in (4, 8))
    # Of tied rows any may come, but each only once.
    cases = [(arrays, four), (arrays, eight), (tied, four | {"k": 40})]
    few, enough, _ = simulate_and_check(cases)
    assert not few.any(), "two of the six best are lost"
    assert enough.all()


def emulated_scan(
    codes, scales, queries, masks, live, tiles, counts, slots, mask_rows,
    *, num_slots, config, in_place,
):  # fmt: skip
    """What the kernel computes, in jnp, one program after the other."""
    steps, lanes = jnp.arange(config.slot_tiles), jnp.arange(64)
    masks = masks & live if in_place else masks

    def program(operands):
        block, own_tiles, count, own_masks = operands
        rows = (own_tiles[:, None] * 64 + lanes).reshape(-1)
        products = block.astype(jnp.float32) @ codes[rows].astype(jnp.float32).T  # exact: < 2^24
        scores = (products * scales[rows]).reshape(len(block), -1, 64)
        places = own_tiles if in_place else steps
        own_words = masks[own_masks].reshape(len(block), -1, 2)[:, places]
        bit = own_words[:, :, lanes // 32] >> (lanes % 32) & 1
        keys = jax.lax.bitcast_convert_type(scores, jnp.int32) & ~config.tag_mask
        keys = jax.lax.bitcast_convert_type(keys | steps[:, None], jnp.float32)
        keys = jnp.where((bit != 0) & (steps < count)[:, None], keys, -3e38)
        return -jnp.sort(-keys, axis=1)[:, : config.kept]

    kept = jax.lax.map(program, (queries, tiles, counts, jnp.maximum(mask_rows, 0)))
    out = jnp.full((num_slots, config.kept * 64), jnp.nan)  # slots of no program are undefined
    places = jnp.where(slots >= 0, slots, num_slots).reshape(-1)
    return out.at[places].set(kept.reshape(len(places), -1), mode="drop")


@pytest.mark.parametrize("count", [1, 20, 200])
def test_best_keys_come_from_the_lanes_of_the_best_first_keys(count):
    """The same keys as one sort of all, though some tie and unused slots hold anything."""
    rng = np.random.default_rng(count)
    keys = -np.sort(-rng.integers(0, 500, (3, 9, 4, 64)).astype(np.float32), axis=2)
    used = rng.random((3, 9)) < 0.7
    used[2] = np.arange(9) == 4  # one slot alone: fewer lanes than keys wanted
    keys = np.where(used[..., None, None], keys, np.float32(np.nan))
    best, slot, lane = map(
        np.asarray, search._best_keys(jnp.asarray(keys), jnp.asarray(used), count)
    )
    flat = np.where(used[..., None, None], keys, np.float32(-3e38)).reshape(3, -1)
    np.testing.assert_array_equal(best, -np.sort(-flat, axis=1)[:, :count])
    real = best > -3e38
    query = np.broadcast_to(np.arange(3)[:, None], best.shape)
    of_lane = keys[query, slot, :, lane]
    assert (of_lane == best[..., None]).any(axis=2)[real].all()


@pytest.mark.parametrize(
    ("k", "num_queries", "share"), [(50, 10**6, True), (50, 1, False), (500, 4, False)]
)
def test_clustered_catalogue(k, num_queries, share, monkeypatch):
    """Schedules, certificate and choice of tiles at a size that the simulator is too slow for."""
    monkeypatch.setattr(search, "ivf_scan", emulated_scan)
    workload = IvfWorkload(60_000, 32, 64, 8, k, 24, 0.5)
    chosen = kernel_heuristic(num_queries, 64, 8, 160, k, (60_000, 256))
    assert chosen.share == share
    for probes in (None, np.arange(24, dtype=np.int32) % 9):
        arrays, options = case(workload, chosen, probes=probes)
        untraced = search.ivf_search.__wrapped__  # pyright: ignore[reportAttributeAccessIssue]
        run = functools.partial(untraced, **options)
        complete = check(jax.jit(run)(*[arrays[name] for name in NAMES]), arrays, options)
        assert np.mean(complete) >= (0.5 if share else 0.9), "lanes keep too little"


@pytest.mark.parametrize("largest", [4, 8])
def test_a_batch_of_few_probes_has_a_program_of_its_own(largest, monkeypatch):
    """Batches on both sides of its bound find the best of the lists that each query probes."""
    monkeypatch.setattr(search, "ivf_scan", emulated_scan)
    workload = IvfWorkload(20_000, 32, 64, 8, 50, 6, 0.5)
    few = 4, 48, kernel_heuristic(6, 64, 4, 48, 50, (20_000, 32))
    whole = kernel_heuristic(6, 64, 64, 400, 50, (20_000, 32), probes_vary=True)
    probes = np.array([0, 1, 2, 3, 4, largest], np.int32)
    arrays, options = case(workload, whole, nprobe=64, probes=probes)
    untraced = search.ivf_search.__wrapped__  # pyright: ignore[reportAttributeAccessIssue]
    run = jax.jit(functools.partial(untraced, **options, few=few))
    complete = check(run(*[arrays[name] for name in NAMES]), arrays, options)
    assert np.mean(complete) >= 0.8


def test_probes_that_vary_are_not_taken_for_a_scan_in_order():
    """The best of few lists lie together, so lanes must keep more than those of all rows."""
    sizes = 16, 4096, 4096, 160_000, 1_000, (10**7, 128)
    assert kernel_heuristic(*sizes, probes_vary=True) != kernel_heuristic(*sizes)
    few = kernel_heuristic(16, 4096, 512, 20_000, 1_000, (10**7, 128))
    slots = max_slots(512, 20_000, few, strided=not few.share)
    assert 16 * slots * few.slot_bytes(128) < 64e6


@pytest.mark.parametrize(
    ("shape", "dtype", "queries", "config", "problem"),
    [
        ((640, 128), "int8", 3, IvfConfig(8, 64), "for the XLA backend"),
        ((640, 128), "float32", 3, OWN, "codes of float32"),
        ((640, 40), "int8", 3, OWN, "rows of 40 codes"),
        ((0, 128), "int8", 3, OWN, "no rows"),
        ((640, 128), "int8", 0, OWN, "no queries"),
        ((640, 128), "int8", 3, IvfKernelConfig(24, 16, 2), "block_queries=24"),
        ((640, 128), "int8", 3, IvfKernelConfig(8, 8, 2), "slot_tiles=8"),
        ((640, 128), "int8", 3, IvfKernelConfig(64, 16, 4), "kept=4"),
        ((640, 128), "int8", 3, IvfKernelConfig(8, 16, 4, stages=1), "stages=1"),
        ((640, 1024), "int8", 3, IvfKernelConfig(8, 16, 4, 4), "bytes of shared memory"),
    ],
)
def test_unsupported_calls_are_explained(shape, dtype, queries, config, problem):
    assert problem in (kernel_problem(shape, dtype, queries, config) or "")


@pytest.mark.parametrize("width", [32, 64, 96, 128, 256, 1024])
@pytest.mark.parametrize("num_queries", [1, 12, 64, 4096])
@pytest.mark.parametrize("k", [10, 1_000, 16_384])
def test_heuristic_is_supported(width, num_queries, k):
    for num_rows, num_lists, nprobe in [(640, 4, 2), (10**7, 4096, 32), (10**7, 4096, 4096)]:
        max_tiles = num_rows * nprobe // num_lists // 64 + 1
        shape = (num_rows // 64 * 64, width)
        config = kernel_heuristic(num_queries, num_lists, nprobe, max_tiles, k, shape)
        assert kernel_problem(shape, "int8", num_queries, config) is None


def test_heuristic_keeps_what_is_wanted():
    """Survivors are more than k, also where k is most of what is scanned."""
    for k, max_tiles in [(16_384, 300), (2_048, 4_000), (10_000, 6_000)]:
        config = kernel_heuristic(16, 4096, 32, max_tiles, k, (10**7, 128))
        slots = max_slots(32, max_tiles, config, strided=not config.share)
        assert slots * config.kept * 64 >= k


def test_search_space_is_supported():
    space = search_space()
    assert {config.block_queries for config in space} == set(BLOCK_QUERIES)
    assert all(kernel_problem((640, 128), "int8", 3, config) is None for config in space)


def test_kernel_config_names_no_xla_blocks():
    arrays, options = case(SMALL, OWN)
    positional = [arrays[name] for name in NAMES[:7]]
    found = ivf_search(*positional, **options)
    np.testing.assert_array_equal(found.scores, run_xla(arrays, options).scores)
    with pytest.raises(BackendError, match="needs an NVIDIA GPU"):
        ivf_search(*positional, **options, backend="mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
class TestOnGpu:
    @pytest.mark.parametrize("share", [True, False])
    @pytest.mark.parametrize("block", BLOCK_QUERIES)
    @pytest.mark.parametrize("width", [32, 64, 128, 256])
    def test_random_searches(self, width, block, share):
        if not share and block != BLOCK_QUERIES[0]:
            pytest.skip("a query of its own fills no block")
        workload = IvfWorkload(50_000, width, 40, 6, 100, 37, 0.3)
        for nprobe, seed in [(6, 0), (6, 1), (40, 2)]:
            config = IvfKernelConfig(block, 16, 128 // block, 4, share)
            arrays, options = case(workload, config, nprobe=nprobe, seed=seed)
            got = ivf_search(*[arrays[name] for name in NAMES[:7]], **options, backend="mosaic_gpu")
            check(got, arrays, options)

    def test_workload_runs_the_kernel(self):
        workload = WORKLOADS["1m_64"]
        arrays = [jnp.asarray(array) for array in workload.arrays().values()]
        compiled = jax.jit(workload.run).lower(*arrays).compile()
        assert "ivf_scan" in (compiled.as_text() or "")
        scores, _, complete = compiled(*arrays)
        want = workload.run(*arrays, backend="xla")
        np.testing.assert_array_equal(scores[complete], want.scores[complete])
        assert np.mean(np.isin(scores, want.scores)) > 0.99
