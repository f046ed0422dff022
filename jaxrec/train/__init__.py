"""Training: step, loop, checkpoints."""
