"""Options are tried on the compiler that is installed."""

from typing import Any

import jax
import pytest

from jaxrec.distributed import UnknownOptionError, XlaOptions


def test_the_compiler_takes_every_option():
    options = XlaOptions(
        parallel_collectives=2,
        gradient_bucket_bytes=1 << 20,
        collectives="symmetric",
        symmetric_buffers=True,
        max_channels=4,
        more={"xla_gpu_use_memcpy_local_p2p": True},
    )
    given = options.compiler_options()
    assert len(given) == 10
    assert given["xla_gpu_all_reduce_combine_threshold_bytes"] == 1 << 20
    step = jax.jit(lambda x: x + 1, compiler_options=given)
    assert step(1) == 2


def test_nothing_is_set_that_nobody_asked_for():
    assert set(XlaOptions(gradient_bucket_bytes=None).compiler_options()) == {
        "xla_gpu_enable_latency_hiding_scheduler",
        "xla_gpu_experimental_collective_start_as_early_as_possible",
        "xla_gpu_experimental_parallel_collective_overlap_limit",
    }


def test_flags_for_the_environment_have_short_names():
    flags = XlaOptions(collectives="peer", latency_hiding=False).xla_flags().split()
    assert "--xla_gpu_enable_latency_hiding_scheduler=false" in flags
    assert "--xla_gpu_all_gather_mode=peer" in flags


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"xla_gpu_enable_latency_hidng_scheduler": True}, "xla_gpu_enable_latency_hiding_schedul"),
        ({"xla_gpu_enable_async_all_to_all": True}, "has no option 'xla_gpu_enable_async_all_to_"),
        ({"xla_gpu_nccl_collective_max_nchannels": "many"}, "does not take 'many'"),
    ],
)
def test_what_the_compiler_does_not_know_is_refused(more, message):
    with pytest.raises(UnknownOptionError, match=message):
        XlaOptions(more=more)


@pytest.mark.parametrize(
    "wrong", [{"parallel_collectives": 0}, {"max_channels": -1}, {"collectives": "fast"}]
)
def test_values_out_of_range(wrong: dict[str, Any], monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match="expected"):
        XlaOptions(**wrong)
