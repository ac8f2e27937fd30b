"""Block-sparse products on NVIDIA and AMD GPUs, in Triton. Nothing here imports Triton before it is needed."""

from lightning_estdgm.sparse.backends.triton._backend import BACKEND as BACKEND
