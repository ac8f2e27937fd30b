"""Small, complete LightningModules and data modules to try the method on, and recipes: ``estdgm train``."""

from typing import TYPE_CHECKING

from lightning_estdgm._lazy import attach

if TYPE_CHECKING:
    from lightning_estdgm.recipes.gnn import GraphNet as GraphNet
    from lightning_estdgm.recipes.gpt import GPT as GPT
    from lightning_estdgm.recipes.gpt import ByteGPT as ByteGPT
    from lightning_estdgm.recipes.graph_files import GraphFiles as GraphFiles
    from lightning_estdgm.recipes.idx_images import IdxImages as IdxImages
    from lightning_estdgm.recipes.image_folders import ImageFolders as ImageFolders
    from lightning_estdgm.recipes.resnet import ImageClassifier as ImageClassifier
    from lightning_estdgm.recipes.resnet import resnet50 as resnet50
    from lightning_estdgm.recipes.stdlib_text import StdlibText as StdlibText
    from lightning_estdgm.recipes.text_files import TextFiles as TextFiles
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        {
            "ByteGPT": "lightning_estdgm.recipes.gpt",
            "GPT": "lightning_estdgm.recipes.gpt",
            "GraphFiles": "lightning_estdgm.recipes.graph_files",
            "GraphNet": "lightning_estdgm.recipes.gnn",
            "IdxImages": "lightning_estdgm.recipes.idx_images",
            "ImageClassifier": "lightning_estdgm.recipes.resnet",
            "ImageFolders": "lightning_estdgm.recipes.image_folders",
            "StdlibText": "lightning_estdgm.recipes.stdlib_text",
            "TextFiles": "lightning_estdgm.recipes.text_files",
            "resnet50": "lightning_estdgm.recipes.resnet",
        },
    )
