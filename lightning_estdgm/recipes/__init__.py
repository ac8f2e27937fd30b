"""Small, complete LightningModules and data modules to try the method on: what the demo and the docs use."""

from lightning_estdgm.recipes.gpt import ByteGPT, StdlibText

__all__ = ["ByteGPT", "StdlibText"]
