"""One process has eight CPU devices, so that sharded code is tested everywhere."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
