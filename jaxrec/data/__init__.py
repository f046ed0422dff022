"""Readers, splits, samplers and packed jagged batches."""
