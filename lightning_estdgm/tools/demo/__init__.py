"""``estdgm demo``: dense against EST-DGM on the same batches."""
