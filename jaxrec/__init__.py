"""Sequence recommenders: trained with JAX, served as one Flax model."""
