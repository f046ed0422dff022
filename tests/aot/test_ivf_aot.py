"""The IVF kernel as the compiler sees it: registers, wgmma, TMA and scratch; bytes it moves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.aot import aot_available, compile_for_h200
from pallas_kernels.ivf import IvfKernelConfig, mosaic_gpu, probed_tiles_bound
from pallas_kernels.ivf.config import TILE_ROWS, kernel_heuristic, max_slots
from pallas_kernels.ivf.workloads import WORKLOADS

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(aot_available() is not None, reason=str(aot_available())),
]
KERNEL = "ivf_scan_mosaic_gpu"
MB = 1e6


def scan(config, width):
    """The kernel alone, for a few hundred programs."""
    programs, block, slots = 300, config.block_queries, 400
    shape = jax.ShapeDtypeStruct
    return compile_for_h200(
        functools.partial(mosaic_gpu.ivf_scan, config=config),
        shape((64_000, width), jnp.int8),
        shape((64_000,), jnp.float32),
        shape((programs, block, width), jnp.int8),
        shape((slots, 2 * config.slot_tiles), jnp.int32),
        shape((programs, config.slot_tiles), jnp.int32),
        shape((programs,), jnp.int32),
        shape((programs, block), jnp.int32),
    )


@pytest.mark.parametrize(
    ("block", "kept", "max_registers"),
    [(8, 4, 56), (8, 8, 72), (8, 16, 128), (16, 8, 112), (32, 4, 128), (64, 2, 128)],
)
def test_machine_code(block, kept, max_registers):
    """128 registers let two programs of two warpgroups share a multiprocessor."""
    config = IvfKernelConfig(block, 64, kept)
    kernel = scan(config, 128).kernel(KERNEL)
    assert kernel.registers <= max_registers
    assert 0 <= kernel.smem_bytes - config.smem_bytes(128) < 4096, "barriers and alignment"
    assert kernel.spill_store_bytes == kernel.spill_load_bytes == kernel.stack_bytes == 0
    assert kernel.count(f"IGMMA.64x{block}x32.S8.S8") + kernel.count("IGMMA") >= 128 // 32
    assert kernel.count("UTMALDG") >= 2 + block, "codes, scales and masks come by TMA"
    assert kernel.count("UBLKCP") == block, "each query's survivors go out in one copy"
    values = TILE_ROWS * block // 128  # of each thread
    assert kernel.count("FMNMX") == values * (2 * kept - 1), "no score is compared twice"
    assert kernel.count("I2FP") + kernel.count("I2F") == values
    assert kernel.count("STG") == 0, "no score is written"


@pytest.mark.parametrize("width", [32, 64, 96, 256, 512])
def test_widths(width):
    kernel = scan(IvfKernelConfig(8, 16, 8, 3), width).kernel(KERNEL)
    assert kernel.spill_store_bytes == 0
    assert kernel.count("IGMMA") == width // 32


@pytest.mark.parametrize("name", ["10m_128", "20m_128"])
def test_whole_search_is_one_small_program(name):
    workload = WORKLOADS[name]
    report = compile_for_h200(workload.run, *workload.shapes())  # no name: the kernel
    assert report.kernel(KERNEL).spill_store_bytes == 0
    assert "ivf_scan" in report.hlo_text
    assert "callback" not in report.hlo_text
    assert "send(" not in report.hlo_text
    assert "infeed" not in report.hlo_text
    assert report.temp_bytes < 64 * MB, "beside the index of 1.3 or 2.6 GB"


@pytest.mark.slow
def test_every_list_probed_is_bounded_in_memory():
    workload = dataclasses.replace(WORKLOADS["10m_128"], nprobe=4096)
    report = compile_for_h200(workload.run, *workload.shapes())
    assert report.kernel(KERNEL)
    score_bytes = 64 * 10_000_000 * 4
    assert report.temp_bytes < score_bytes / 8


def moved_bytes(workload, config, seed=0):
    """Bytes that the search moves, from the grid that random probes give; and distinct lists."""
    rng = np.random.default_rng(seed)
    num_queries, nprobe = workload.num_queries, workload.nprobe
    lists = np.stack([rng.permutation(workload.num_lists)[:nprobe] for _ in range(num_queries)])
    offsets = workload.tile_offsets()
    bound = probed_tiles_bound(offsets, nprobe)
    num_slots = max_slots(
        nprobe,
        bound,
        config,
        strided=not config.share,
        max_list_tiles=probed_tiles_bound(offsets, 1),
    )
    make_slots = mosaic_gpu._list_slots if config.share else mosaic_gpu._strided_slots
    slots = make_slots(
        jnp.asarray(offsets[lists]),
        jnp.asarray(np.diff(offsets)[lists]),
        num_slots,
        config.slot_tiles,
    )
    distinct = int(offsets[-1]) // config.slot_tiles + workload.num_lists
    total = num_queries * num_slots
    programs = np.asarray(mosaic_gpu._programs(slots, config.num_programs(total, distinct), config))
    used = programs[programs[:, 0] >= 0]
    tiles = int(np.asarray(slots.counts).reshape(-1)[used[:, 0]].sum())
    # Each tile has a query's mask words gathered, written and read again.
    words = 3 * total * config.slot_tiles * 8
    blocks = 2 * programs.size * workload.width
    survivors = 2 * total * config.kept * TILE_ROWS * 4
    rescored = num_queries * workload.k * 1.07 * (workload.width + 4)
    centroids = workload.num_lists * workload.width * 4
    codes = tiles * TILE_ROWS * (workload.width + 4)
    parts = (codes, words, blocks, survivors, rescored, centroids)
    return sum(parts), np.unique(lists).size


@pytest.mark.parametrize(
    ("name", "share", "limit"),
    [
        ("10m_128_q1", False, 1.15),
        ("20m_128", False, 1.15),
        ("10m_128", True, 1.15),
        ("10m_128_q512", True, 1.3),  # four queries share a row, but survivors are each one's own
    ],
)
def test_bytes_moved_are_near_the_floor(name, share, limit):
    """Floor: the lists that the batch probes, read once (codes and scales), and the centroids."""
    workload = WORKLOADS[name]
    bound = probed_tiles_bound(workload.tile_offsets(), workload.nprobe)
    chosen = kernel_heuristic(
        workload.num_queries, workload.num_lists, workload.nprobe, bound, workload.k,
        (workload.num_rows, workload.width),
    )  # fmt: skip
    config = IvfKernelConfig(8, 64, 8, share=True) if share else chosen
    moved, distinct = moved_bytes(workload, config)
    expected = workload.distinct_lists()
    assert abs(distinct / expected - 1) < 0.1
    floor = workload.floor_bytes() * distinct / expected
    print(f"{name}: {moved / MB:.1f} MB, floor {floor / MB:.1f} MB, {moved / floor:.3f}")
    assert moved <= limit * floor


def test_hundred_results_of_512_queries_are_near_the_floor():
    """Blocks of 16 queries; each row is read once for the four that probe its list on average."""
    workload = dataclasses.replace(WORKLOADS["10m_128_q512"], k=100)
    moved, distinct = moved_bytes(workload, IvfKernelConfig(16, 64, 4, share=True))
    assert moved <= 1.15 * workload.floor_bytes() * distinct / workload.distinct_lists()


def test_sharing_saves_bytes():
    """Codes shared by 64 queries: 1.27 times fewer; by 512 four times, less what survivors take."""
    workload = WORKLOADS["10m_128"]
    own, _ = moved_bytes(workload, IvfKernelConfig(8, 128, 8))
    shared, _ = moved_bytes(workload, IvfKernelConfig(8, 64, 8, share=True))
    assert 1.1 < own / shared < 1.4
    large = WORKLOADS["10m_128_q512"]
    own, _ = moved_bytes(large, IvfKernelConfig(8, 128, 8))
    shared, _ = moved_bytes(large, IvfKernelConfig(8, 64, 8, share=True))
    assert own / shared > 2.5
