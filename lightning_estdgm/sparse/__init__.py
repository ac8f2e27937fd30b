"""Sparse compute: products on the active blocks of a weight, and the choice of what computes them."""

from typing import TYPE_CHECKING

from lightning_estdgm._lazy import attach

if TYPE_CHECKING:
    from lightning_estdgm.sparse._conv import masked_conv2d as masked_conv2d
    from lightning_estdgm.sparse._conv_geometry import ConvGeometry as ConvGeometry
    from lightning_estdgm.sparse._linear import masked_linear as masked_linear
    from lightning_estdgm.sparse._topology import BlockTopology as BlockTopology
    from lightning_estdgm.sparse.backends._protocol import conv_refusal as conv_refusal
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        {
            "BlockTopology": "lightning_estdgm.sparse._topology",
            "ConvGeometry": "lightning_estdgm.sparse._conv_geometry",
            "conv_refusal": "lightning_estdgm.sparse.backends._protocol",
            "masked_conv2d": "lightning_estdgm.sparse._conv",
            "masked_linear": "lightning_estdgm.sparse._linear",
        },
    )
