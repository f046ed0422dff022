"""One process has eight CPU devices, so that sharded code is tested everywhere."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True, scope="module")
def programs_go_with_their_module():
    """Frees what a module compiled: each program takes memory maps, of which a process has few."""
    yield
    jax.clear_caches()
