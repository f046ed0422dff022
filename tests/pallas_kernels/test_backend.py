"""No name takes the best supported backend; a name never falls back."""

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import BackendError
from pallas_kernels._backend import resolve

cpu_only = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the default device is a GPU")


def on(kind, platform="gpu"):
    device = AbstractDevice(kind, 132, platform)
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def fits():
    return None


@cpu_only
def test_cpu_takes_xla_and_refuses_the_kernel():
    assert resolve("op", None, fits) == resolve("op", "xla", fits) == "xla"
    with pytest.raises(BackendError, match=r"op: backend 'mosaic_gpu' .* the target is 'cpu'"):
        resolve("op", "mosaic_gpu", fits)


@pytest.mark.parametrize(
    ("kind", "any_kernel", "wgmma_kernel"),
    [
        ("NVIDIA H200", "mosaic_gpu", "mosaic_gpu"),
        ("NVIDIA B200", "mosaic_gpu", "xla"),
        ("NVIDIA A100", "xla", "xla"),
    ],
)
def test_target_of_a_deviceless_compile_decides(kind, any_kernel, wgmma_kernel):
    with on(kind):
        assert resolve("op", None, fits) == any_kernel
        assert resolve("op", None, fits, wgmma=True) == wgmma_kernel


def test_unsupported_shapes():
    with on("NVIDIA H200"):
        assert resolve("op", None, lambda: "a width of 3") == "xla"
        with pytest.raises(BackendError, match="a width of 3"):
            resolve("op", "mosaic_gpu", lambda: "a width of 3")


def test_unknown_name():
    with pytest.raises(BackendError, match="unknown backend 'triton'"):
        resolve("op", "triton", fits)
