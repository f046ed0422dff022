"""Device-less compiles need the CUDA plugin registered where no driver answers its checks."""

import os

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
