"""Cheaper training in PyTorch Lightning: EST-DGM with real sparse compute, and joules that were measured."""

from lightning_estdgm.callbacks.dgm import DGMCallback
from lightning_estdgm.callbacks.energy import EnergyMonitor
from lightning_estdgm.callbacks.requeue import RequeueBetweenSteps
from lightning_estdgm.config import DGMConfig
from lightning_estdgm.energy.energy_meter import EnergyMeter
from lightning_estdgm.energy.footprint import Footprint
from lightning_estdgm.engine.controller import DGMController, LayerDecision
from lightning_estdgm.method.schedules import EstDgm, Phase
from lightning_estdgm.plugins.checkpoint_io import SparseCheckpointIO, densify_checkpoint
from lightning_estdgm.presets import preset

__version__ = "0.1.0"
__all__ = [
    "DGMCallback",
    "DGMConfig",
    "DGMController",
    "EnergyMeter",
    "EnergyMonitor",
    "EstDgm",
    "Footprint",
    "LayerDecision",
    "Phase",
    "RequeueBetweenSteps",
    "SparseCheckpointIO",
    "densify_checkpoint",
    "preset",
]
