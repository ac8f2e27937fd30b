"""Cheaper training in PyTorch Lightning: EST-DGM with real sparse compute, and joules that were measured."""

from typing import TYPE_CHECKING

from lightning_estdgm._lazy import attach

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lightning_estdgm.callbacks.dgm import DGMCallback as DGMCallback
    from lightning_estdgm.callbacks.energy import EnergyMonitor as EnergyMonitor
    from lightning_estdgm.callbacks.requeue import RequeueBetweenSteps as RequeueBetweenSteps
    from lightning_estdgm.config import DGMConfig as DGMConfig
    from lightning_estdgm.config import Selection as Selection
    from lightning_estdgm.config import StepSize as StepSize
    from lightning_estdgm.config import Units as Units
    from lightning_estdgm.distributed._mask_check import MasksDifferError as MasksDifferError
    from lightning_estdgm.energy._energy_meter import EnergyMeter as EnergyMeter
    from lightning_estdgm.energy._footprint import Footprint as Footprint
    from lightning_estdgm.engine._controller import DGMController as DGMController
    from lightning_estdgm.engine._decisions import LayerDecision as LayerDecision
    from lightning_estdgm.export._densify import densify_checkpoint as densify_checkpoint
    from lightning_estdgm.method._schedules import EstDgm as EstDgm
    from lightning_estdgm.method._schedules import Phase as Phase
    from lightning_estdgm.method._update_rule import UpdateRule as UpdateRule
    from lightning_estdgm.modules._expert_adapter import ExpertAdapter as ExpertAdapter
    from lightning_estdgm.plugins.checkpoint_io import SparseCheckpointIO as SparseCheckpointIO
    from lightning_estdgm.presets import preset as preset
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        {
            "DGMCallback": "lightning_estdgm.callbacks.dgm",
            "DGMConfig": "lightning_estdgm.config",
            "MasksDifferError": "lightning_estdgm.distributed._mask_check",
            "Selection": "lightning_estdgm.config",
            "StepSize": "lightning_estdgm.config",
            "Units": "lightning_estdgm.config",
            "UpdateRule": "lightning_estdgm.method._update_rule",
            "DGMController": "lightning_estdgm.engine._controller",
            "EnergyMeter": "lightning_estdgm.energy._energy_meter",
            "EnergyMonitor": "lightning_estdgm.callbacks.energy",
            "EstDgm": "lightning_estdgm.method._schedules",
            "ExpertAdapter": "lightning_estdgm.modules._expert_adapter",
            "Footprint": "lightning_estdgm.energy._footprint",
            "LayerDecision": "lightning_estdgm.engine._decisions",
            "Phase": "lightning_estdgm.method._schedules",
            "RequeueBetweenSteps": "lightning_estdgm.callbacks.requeue",
            "SparseCheckpointIO": "lightning_estdgm.plugins.checkpoint_io",
            "densify_checkpoint": "lightning_estdgm.export._densify",
            "preset": "lightning_estdgm.presets",
        },
    )
