"""``estdgm train``: a recipe, a method and LightningCLI; settings come from the YAML files beside the recipes."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_estdgm.callbacks.dgm import DGMCallback
from lightning_estdgm.callbacks.energy import EnergyMonitor
from lightning_estdgm.presets import PRESETS

CONFIGS = Path(__file__).parents[1] / "recipes"
"""Folder of the configurations that come with the package."""
_LIGHTNING_CLI = ("jsonargparse", "docstring_parser", "typeshed_client")  # jsonargparse[signatures]
INSTALL = "pip install 'lightning-estdgm[recipes]'"


@dataclass(frozen=True)
class Recipe:
    """Parts that ``estdgm train NAME`` puts together.

    Attributes:
        model: module and name of the LightningModule.
        data: module and name of the LightningDataModule, whose argument ``path`` is ``--data``.
        config: default configuration, a YAML file beside the recipes.
        links: settings of the model that come from the data's.
        made_links: settings of the model that come from what the data module found on disk.
        per: further units that energy is counted per: a unit's name, and a function of the batch that returns the
            number.
        packages: packages beyond this package's own requirements.

    """

    model: str
    data: str
    config: str
    links: dict[str, str] = field(default_factory=dict)
    made_links: dict[str, str] = field(default_factory=dict)
    per: dict[str, Callable[[Any], int]] = field(default_factory=dict)
    packages: tuple[str, ...] = ()


def _tokens(batch: Any) -> int:
    return int(batch[0].numel())


def _nodes(batch: Any) -> int:
    return int(batch.num_nodes)


RECIPES = {
    "gpt": Recipe(
        "lightning_estdgm.recipes.gpt:GPT",
        "lightning_estdgm.recipes.text_files:TextFiles",
        "gpt-125m",
        links={"seed_everything": "data.seed", "data.context": "model.context"},
        made_links={"data.vocabulary": "model.vocabulary"},
        per={"token": _tokens},
    ),
    "resnet": Recipe(
        "lightning_estdgm.recipes.resnet:ImageClassifier",
        "lightning_estdgm.recipes.image_folders:ImageFolders",
        "resnet50",
        links={"seed_everything": "data.seed"},
        made_links={"data.num_classes": "model.num_classes"},
    ),
    "gnn": Recipe(
        "lightning_estdgm.recipes.gnn:GraphNet",
        "lightning_estdgm.recipes.graph_files:GraphFiles",
        "gcn-cora",
        made_links={"data.features": "model.features", "data.classes": "model.classes"},
        per={"node": _nodes},
        packages=("torch_geometric", "scipy"),
    ),
}


METHODS = ("dense", "dgm", *sorted(PRESETS))
"""Values of ``--method``: dense training, EST-DGM, and every preset of `presets.PRESETS`."""


def callback_for(
    method: str, density: float | None = None, override: dict[str, Any] | None = None
) -> DGMCallback | None:
    """Return the callback of a method, ``None`` for ``dense``.

    Args:
        method: one of `METHODS`; ``dgm`` is the preset est-dgm.
        density: active share of the masked weights at the end; 0.1 by default.
        override: settings of the preset, and fields of `DGMConfig`.

    Raises:
        ValueError: for an unknown method, and for settings that it does not have.
        TypeError: for a setting that neither the preset nor `DGMConfig` knows.

    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(METHODS)}")
    if method == "dense":
        if density is not None or override:
            raise ValueError(f"method: dense takes no density and no override, got {density} and {override}")
        return None
    name = "est-dgm" if method == "dgm" else method
    return DGMCallback.from_preset(name, 0.1 if density is None else density, **(override or {}))


def bundled_configs() -> tuple[str, ...]:
    """Return the names of the configurations that come with the package."""
    return tuple(sorted(f.stem for f in CONFIGS.glob("*.yaml")))


def arguments(recipe: str, given: Sequence[str]) -> list[str]:
    """Return LightningCLI's arguments: the recipe's configuration, then what was given.

    ``--data PATH`` is short for ``--data.path PATH``, ``--config NAME`` for the path of a configuration that comes with
    the package; one of those that is given first stands in for the recipe's own.

    >>> arguments("gnn", ["--data", "Cora"])[2:]
    ['--data.path', 'Cora']
    """
    result, bundled, names = [], False, bundled_configs()
    words = [w for word in given for w in _split(word)]
    for before, word in zip(["", *words], words, strict=False):
        if before in ("--config", "-c") and word in names:
            word, bundled = str(CONFIGS / f"{word}.yaml"), True
        result.append("--data.path" if word == "--data" else word)
    result = _with_whole_parts(result)
    return result if bundled else ["--config", str(CONFIGS / f"{RECIPES[recipe].config}.yaml"), *result]


def _split(word: str) -> list[str]:
    name, equals, value = word.partition("=")
    return [name, value] if equals and name in ("--data", "--config") else [word]


def _with_whole_parts(words: Sequence[str]) -> list[str]:
    """Have all fields of a part that are overridden be one mapping: of several, jsonargparse would keep the last.

    >>> _with_whole_parts(["--override.units.size", "16", "--density=0.2", "--override.units.distribution=erk"])
    ['--density=0.2', '--override.units={size: 16, distribution: erk}']
    """
    parts: dict[str, list[str]] = {}
    others = []
    left = iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if found := re.fullmatch(r"--override\.(\w+)\.(\w+)", name):
            parts.setdefault(found[1], []).append(f"{found[2]}: {value if equals else next(left, '')}")
        else:
            others.append(word)
    return others + [f"--override.{part}={{{', '.join(fields)}}}" for part, fields in parts.items()]


@dataclass(frozen=True)
class RecipeRun:
    """Model, data and Trainer of a run that is ready to start.

    Attributes:
        model: the LightningModule.
        data: the LightningDataModule.
        trainer: Trainer with the method's callback, EnergyMonitor and the loggers.
        ckpt_path: checkpoint to go on from.

    """

    model: LightningModule
    data: LightningDataModule
    trainer: Trainer
    ckpt_path: str | None

    def fit(self) -> None:
        """Train."""
        self.trainer.fit(self.model, datamodule=self.data, ckpt_path=self.ckpt_path)


def prepare(recipe: str, given: Sequence[str]) -> RecipeRun:
    """Make a run of a recipe from command-line arguments.

    Raises SystemExit for arguments that do not fit, ModuleNotFoundError that says what to install, and the errors of
    the recipe's model and data for bad settings and missing files.
    """
    chosen = RECIPES[recipe]
    for package in (*_LIGHTNING_CLI, *chosen.packages):
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"it needs {package}, which is not installed: {INSTALL}", name=package)
    # LightningCLI warns where it is given arguments and finds others in sys.argv.
    argv, sys.argv = sys.argv, sys.argv[:1]
    try:
        cli = RecipeCLI(recipe, arguments(recipe, given))
    finally:
        sys.argv = argv
    return RecipeRun(cli.model, cli.datamodule, cli.trainer, cli.config["ckpt_path"])


class RecipeCLI(LightningCLI):
    """LightningCLI for one recipe: its classes and links, the method's callback, EnergyMonitor and TensorBoard."""

    def __init__(self, name: str, args: list[str]) -> None:
        self.recipe, self.name = RECIPES[name], name
        super().__init__(
            _load(self.recipe.model),
            _load(self.recipe.data),
            seed_everything_default=0,
            parser_kwargs={"prog": f"estdgm train {name}"},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what is not LightningCLI's, and have one setting given once."""
        parser.add_argument("--method", default="dgm", help=f"One of {', '.join(METHODS)}.")
        parser.add_argument("--density", type=float | None, default=None, help="Of the final masks; 0.1 by default.")
        parser.add_argument(
            "--override",
            type=dict[str, dict[str, Any] | Any],  # of Any alone, fields of a part stay strings
            default={},
            help="Settings of the method, such as --override.update_every 100 or '--override.units={size: 16}'.",
        )
        parser.add_argument("--output", default=f"runs/{self.name}", help="Runs go to OUTPUT/METHOD/version_N.")
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="A checkpoint to go on from.")
        for source, target in self.recipe.links.items():
            parser.link_arguments(source, target)
        for source, target in self.recipe.made_links.items():
            parser.link_arguments(source, target, apply_on="instantiate")

    def before_instantiate_classes(self) -> None:
        """Make the callback first: a wrong method is seen before any data is read."""
        self.method = callback_for(self.config["method"], self.config["density"], self.config["override"])

    def instantiate_trainer(self, **settings: Any) -> Trainer:
        """Make the Trainer, with the callbacks of its configuration and those that every run has."""
        configured = self.config_init["trainer"]
        callbacks = configured["callbacks"] or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        callbacks += [] if self.method is None else [self.method]
        callbacks.append(EnergyMonitor(per=self.recipe.per))
        logger = configured["logger"]
        if logger is None or logger is True:
            name = re.sub(r"\W", "-", self.config["method"])  # ac/dc is no folder in a folder
            logger = TensorBoardLogger(self.config["output"], name=name, default_hp_metric=False)
        return super().instantiate_trainer(callbacks=callbacks, logger=logger, **settings)


def _load(path: str) -> Any:
    module, name = path.split(":")
    return getattr(import_module(module), name)
