"""Layouts of weights over ranks, collectives on them, and the comparison of masks between ranks."""

from typing import TYPE_CHECKING

from lightning_estdgm._lazy import attach

if TYPE_CHECKING:
    from lightning_estdgm.distributed._comm_hook import ActiveUnits as ActiveUnits
    from lightning_estdgm.distributed._comm_hook import active_units_hook as active_units_hook
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        {
            "ActiveUnits": "lightning_estdgm.distributed._comm_hook",
            "active_units_hook": "lightning_estdgm.distributed._comm_hook",
        },
    )
