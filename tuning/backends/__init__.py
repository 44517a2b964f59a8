"""One candidate to one Trial: the backends, the kernels they time, and the check of numerics."""
