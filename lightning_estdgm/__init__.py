"""Cheaper training in PyTorch Lightning: EST-DGM with real sparse compute, and joules that were measured."""

from lightning_estdgm.callbacks.dgm import DGMCallback
from lightning_estdgm.callbacks.energy import EnergyMonitor
from lightning_estdgm.controller import DGMConfig, DGMController, LayerDecision
from lightning_estdgm.schedules import EstDgm, Phase

__version__ = "0.1.0"
__all__ = ["DGMCallback", "DGMConfig", "DGMController", "EnergyMonitor", "EstDgm", "LayerDecision", "Phase"]
