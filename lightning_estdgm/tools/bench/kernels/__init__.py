"""``estdgm bench kernels``: the sparse products against the dense library and against other sparse ones."""
