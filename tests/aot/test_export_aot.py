"""Exported retrievers for NVIDIA GPUs, made and compiled on a machine without one."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.nn import SASRec, SASRecConfig
from jaxrec.ops.jagged import JaggedBatch
from jaxrec.retrieval import Retriever
from jaxrec.retrieval.planner import SMALL_ROWS
from jaxrec.serve import export_retriever
from pallas_kernels.aot import aot_available, compile_for_h200, cudnn_of_an_h200, h200_mesh

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(aot_available() is not None, reason=str(aot_available())),
]
NUM_ITEMS, WIDTH = 500, 64


class LastItemTower(nnx.Module):
    """Embeds the last item of each sequence."""

    def __init__(self, num_items: int):
        self.table = nnx.Param(jax.random.normal(jax.random.key(0), (num_items + 1, WIDTH)))

    def encode(self, batch: JaggedBatch):
        return self.table[...][batch.item_ids]

    def item_embeddings(self):
        return self.table[...]


@pytest.fixture(scope="module")
def retriever():
    return build(NUM_ITEMS)


def build(num_items, tower: Callable[[int], Any] = LastItemTower):
    features = {"tag": np.arange(num_items) % 50}
    return Retriever.build(tower(num_items), features, key=jax.random.key(0), nlist=8)


def compiled(folder: Path):
    """The program of one history, and what the compiler makes of it for an H200."""
    data = (folder / "programs" / "1.stablehlo").read_bytes()
    program = jax.export.deserialize(bytearray(data))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in program.in_avals]
    return program, compile_for_h200(program.call, *jax.tree.unflatten(program.in_tree, shapes)[0])


def assert_stays_on_the_device(report):
    text = report.hlo_text
    assert not re.findall(r"callback|infeed|outfeed|= \S+ send\(|= \S+ recv\(", text)


def test_the_portable_program_compiles_for_an_h200(retriever, tmp_path):
    folder = export_retriever(retriever, tmp_path / "out", k=5, batch_sizes=(1,), max_length=4)
    program, report = compiled(folder)
    assert program.platforms == ("cpu", "cuda")
    assert_stays_on_the_device(report)
    assert "mosaic_gpu" not in report.hlo_text


def test_the_program_for_cuda_alone_holds_the_kernels(tmp_path):
    retriever = build(2 * SMALL_ROWS)  # smaller ones are searched by brute force
    with jax.sharding.use_abstract_mesh(h200_mesh().abstract_mesh):
        folder = export_retriever(
            retriever, tmp_path / "out", k=5, batch_sizes=(1,), max_length=4, platforms=("cuda",)
        )
    program, report = compiled(folder)
    assert program.platforms == ("cuda",)
    assert_stays_on_the_device(report)
    assert "ivf_scan_mosaic_gpu" in report.hlo_text
    assert "bloom_search_mosaic_gpu" in report.hlo_text
    assert jnp.zeros(1).devices().pop().platform == "cpu"


def test_the_program_for_cuda_alone_holds_cudnns_attention(tmp_path):
    config = SASRecConfig(
        num_items=NUM_ITEMS, max_len=16, width=16, num_heads=2, compute_dtype="bfloat16"
    )
    retriever = build(NUM_ITEMS, lambda _: SASRec(config, rngs=nnx.Rngs(0)))
    with jax.sharding.use_abstract_mesh(h200_mesh().abstract_mesh), cudnn_of_an_h200():
        folder = export_retriever(
            retriever, tmp_path / "out", k=5, batch_sizes=(1,), max_length=16, platforms=("cuda",)
        )
    _, report = compiled(folder)
    assert_stays_on_the_device(report)
    assert report.hlo_text.count('"__cudnn$fmhaSoftmax"') == config.num_blocks
