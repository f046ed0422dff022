"""One process has eight CPU devices, so that sharded code is tested everywhere."""

from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

_MAPS = Path("/proc/self/maps")
_MANY_MAPS = 30_000  # Linux allows 65,530


@pytest.fixture(autouse=True, scope="module")
def programs_do_not_pile_up():
    """Frees compiled programs in time: each takes memory maps, of which a process has few."""
    yield
    if not _MAPS.exists() or len(_MAPS.read_bytes().splitlines()) > _MANY_MAPS:
        jax.clear_caches()
