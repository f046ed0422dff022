"""GPU kernels for recommenders, each with an XLA reference."""
