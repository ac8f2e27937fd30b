"""Helpers of the callbacks, used nowhere else."""
