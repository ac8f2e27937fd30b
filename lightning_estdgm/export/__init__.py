"""Trained models and checkpoints in the forms that other programs read."""

from typing import TYPE_CHECKING

from lightning_estdgm._lazy import attach

if TYPE_CHECKING:
    from lightning_estdgm.export._checkpoint import export_checkpoint as export_checkpoint
    from lightning_estdgm.export._densify import densify_checkpoint as densify_checkpoint
    from lightning_estdgm.export._export import ExportReport as ExportReport
    from lightning_estdgm.export._export import export_model as export_model
    from lightning_estdgm.export.targets._protocol import ExportError as ExportError
    from lightning_estdgm.export.targets._protocol import ExportInput as ExportInput
    from lightning_estdgm.export.targets._protocol import ExportTarget as ExportTarget
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        {
            "densify_checkpoint": "lightning_estdgm.export._densify",
            "export_checkpoint": "lightning_estdgm.export._checkpoint",
            "export_model": "lightning_estdgm.export._export",
            "ExportError": "lightning_estdgm.export.targets._protocol",
            "ExportInput": "lightning_estdgm.export.targets._protocol",
            "ExportReport": "lightning_estdgm.export._export",
            "ExportTarget": "lightning_estdgm.export.targets._protocol",
        },
    )
