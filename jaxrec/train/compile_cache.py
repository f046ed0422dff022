"""Keeps compiled programs on disk, so that the next run of the same step starts at once."""

from pathlib import Path

import jax


def use_compile_cache(folder: str | Path) -> Path:
    """Has JAX keep every compiled program there; a folder that was chosen before stays.

    Programs are found again by their code, shapes, versions and device.

    Returns:
      the folder in use.
    """
    chosen = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if chosen:
        return Path(chosen)
    jax.config.update("jax_compilation_cache_dir", str(Path(folder).absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return Path(folder)
