"""Small, complete LightningModules and data modules to try the method on, and recipes: ``estdgm train``."""

from typing import TYPE_CHECKING

from lightning_estdgm._lazy import attach

if TYPE_CHECKING:
    from lightning_estdgm.recipes.gpt import GPT as GPT
    from lightning_estdgm.recipes.gpt import ByteGPT as ByteGPT
    from lightning_estdgm.recipes.stdlib_text import StdlibText as StdlibText
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        {
            "ByteGPT": "lightning_estdgm.recipes.gpt",
            "GPT": "lightning_estdgm.recipes.gpt",
            "StdlibText": "lightning_estdgm.recipes.stdlib_text",
        },
    )
