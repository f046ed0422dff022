"""Pure functions over arrays: the mathematics that the modules of `jaxrec.nn` call."""
