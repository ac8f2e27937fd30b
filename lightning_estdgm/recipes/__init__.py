"""Small, complete LightningModules and data modules to try the method on, and recipes: ``estdgm train``."""

from lightning_estdgm.recipes.gpt import GPT, ByteGPT
from lightning_estdgm.recipes.stdlib_text import StdlibText

__all__ = ["GPT", "ByteGPT", "StdlibText"]
