"""Thin Flax (NNX) modules: parameters, and one call into a pure function."""
