"""Trained models and checkpoints in the forms that other programs read.

``packed(model)`` returns a copy whose masked linear layers are `PackedLinear` and convolutions `PackedConv2d`: values
of active units, int32 lists, bias, no dense weight. ``save_packed(model, path)`` and ``load_packed(path, model)`` write
and read one. Each of these layers is one call of

``estdgm::packed_linear(Tensor x, Tensor values, Tensor ptr, Tensor idx, Tensor? outputs, Tensor? ends, Tensor? scale,
Tensor? bias, int[] sides, int in_features, int out_features) -> Tensor``

with x float32 ``[..., in_features]`` on the CPU. It is registered by a shared library that `operator_library` builds
for this machine (C++ alone: ``dlopen`` of the path that it returns is enough), and goes through ``torch.export`` and
AOTInductor as it is. Call `operator_library` before ``torch.export.load`` or a package with packed layers.
"""

from typing import TYPE_CHECKING

from lightning_estdgm._lazy import attach

if TYPE_CHECKING:
    from lightning_estdgm.export._aoti_package import load_aoti as load_aoti
    from lightning_estdgm.export._checkpoint import export_checkpoint as export_checkpoint
    from lightning_estdgm.export._densify import densify_checkpoint as densify_checkpoint
    from lightning_estdgm.export._densify import densify_model as densify_model
    from lightning_estdgm.export._export import ExportReport as ExportReport
    from lightning_estdgm.export._export import export_model as export_model
    from lightning_estdgm.export._packed import load_packed as load_packed
    from lightning_estdgm.export._packed import packed as packed
    from lightning_estdgm.export._packed import save_packed as save_packed
    from lightning_estdgm.export._packed_layers import PackedConv2d as PackedConv2d
    from lightning_estdgm.export._packed_layers import PackedLinear as PackedLinear
    from lightning_estdgm.export.targets._protocol import ExportError as ExportError
    from lightning_estdgm.export.targets._protocol import ExportInput as ExportInput
    from lightning_estdgm.export.targets._protocol import ExportTarget as ExportTarget
    from lightning_estdgm.sparse.backends.native._operator import operator_library as operator_library
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        {
            "PackedConv2d": "lightning_estdgm.export._packed_layers",
            "PackedLinear": "lightning_estdgm.export._packed_layers",
            "densify_checkpoint": "lightning_estdgm.export._densify",
            "densify_model": "lightning_estdgm.export._densify",
            "export_checkpoint": "lightning_estdgm.export._checkpoint",
            "export_model": "lightning_estdgm.export._export",
            "ExportError": "lightning_estdgm.export.targets._protocol",
            "ExportInput": "lightning_estdgm.export.targets._protocol",
            "ExportReport": "lightning_estdgm.export._export",
            "ExportTarget": "lightning_estdgm.export.targets._protocol",
            "load_aoti": "lightning_estdgm.export._aoti_package",
            "load_packed": "lightning_estdgm.export._packed",
            "operator_library": "lightning_estdgm.sparse.backends.native._operator",
            "packed": "lightning_estdgm.export._packed",
            "save_packed": "lightning_estdgm.export._packed",
        },
    )
