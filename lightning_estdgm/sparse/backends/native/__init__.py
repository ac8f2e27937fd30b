"""Blocked products on the CPU by a small compiled operator.

The machine's C++ compiler builds the operators on first use (`build`). Where there is none, the `cpu` backend does
without.
"""

from lightning_estdgm.sparse.backends.native._backend import BACKEND as BACKEND
