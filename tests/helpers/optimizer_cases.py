"""A whole small run of the method under one optimizer, and the optimizers that are really tried so."""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_estdgm.config import DGMConfig, StepSize, Units
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.engine._state_trial import fresh_state_rules
from lightning_estdgm.method._schedules import EstDgm, Phase

STEPS = 60
SCHEDULE = EstDgm(Phase(0.7, 0.6, 15), Phase(0.3, 0.2, 15), Phase(0.15, 0.1, 30), update_every=5, observe_steps=2)
WIDTH = 64  # weights of 4,096 elements, the smallest that 8-bit optimizers quantise


@dataclass(frozen=True)
class OptimizerCase:
    """One optimizer with settings for the small run.

    Attributes:
        library: module that has it.
        name: class in it.
        lr: learning rate.
        settings: other arguments.
        inner: torch optimizer that it wraps: ``"given"`` as an object, ``"named"`` as a class in the first argument.
        closure: whether its step needs one.

    """

    library: str
    name: str
    lr: float | None
    settings: tuple[tuple[str, Any], ...] = ()
    inner: str = ""
    closure: bool = False

    def __str__(self) -> str:
        return f"{self.library.split('.')[0]} {self.name}"

    def make(self, model: nn.Module) -> Any:
        """Return the optimizer for a model; an optimizer of matrices gets those only."""
        kind = getattr(importlib.import_module(self.library), self.name)
        held = [p for p in model.parameters() if p.dim() > 1 or self.name != "Muon"]
        rate = {} if self.lr is None else {"lr": self.lr}
        settings = dict(self.settings)
        if self.inner == "given":
            return kind(torch.optim.Adam(held, **rate), **settings)
        if self.inner == "named":
            return kind(held, torch.optim.SGD, **rate, **settings)
        return kind(held, **rate, **settings)


def case(library: str, name: str, lr: float | None, **rest: Any) -> OptimizerCase:
    """Return a case; arguments that are not its own are settings of the optimizer."""
    own = {key: rest.pop(key) for key in ("inner", "closure") if key in rest}
    return OptimizerCase(library, name, lr, tuple(rest.items()), **own)


TORCH = [
    case("torch.optim", "SGD", 0.5),
    case("torch.optim", "SGD", 0.02, momentum=0.9),
    case("torch.optim", "Adam", 3e-3),
    case("torch.optim", "AdamW", 3e-3),
    case("torch.optim", "AdamW", 3e-3, amsgrad=True),
    case("torch.optim", "NAdam", 3e-3),
    case("torch.optim", "RAdam", 1e-2),
    case("torch.optim", "Adamax", 3e-3),
    case("torch.optim", "ASGD", 0.5, t0=20),
    case("torch.optim", "Rprop", 1e-3),
    case("torch.optim", "Adagrad", 1e-2),
    case("torch.optim", "Adadelta", 0.5),
    case("torch.optim", "RMSprop", 1e-3, momentum=0.5, centered=True),
    case("torch.optim", "Adafactor", 1e-2),
    case("torch.optim", "Muon", 3e-3),
    case("torch.optim", "LBFGS", 0.1, max_iter=4, closure=True),
]
OTHERS = [
    case("schedulefree", "AdamWScheduleFree", 5e-3),
    case("schedulefree", "SGDScheduleFree", 1.0),
    case("schedulefree", "RAdamScheduleFree", 2e-2),
    case("bitsandbytes.optim", "Adam8bit", 3e-3),
    case("bitsandbytes.optim", "AdamW8bit", 3e-3),
    case("bitsandbytes.optim", "Lion8bit", 1e-3),
    case("torchao.optim", "AdamW8bit", 3e-3),
    case("torchao.optim", "AdamW4bit", 3e-3),
    case("torchao.optim", "AdamWFp8", 3e-3),
    case("pytorch_optimizer", "Lookahead", 5e-3, inner="given"),
    case("pytorch_optimizer", "SAM", 0.3, inner="named", closure=True),
    case("pytorch_optimizer", "SOAP", 3e-3),
    case("pytorch_optimizer", "Shampoo", 3e-2),
    case("pytorch_optimizer", "Lion", 1e-3),
    case("pytorch_optimizer", "Lion", 3e-3, cautious=True),
    case("pytorch_optimizer", "CAME", 3e-4),
    case("pytorch_optimizer", "FTRL", 3e-2),
    case("pytorch_optimizer", "Prodigy", 1.0),
    case("prodigyopt", "Prodigy", 1.0),
    case("prodigyopt", "Prodigy", 1.0, slice_p=11),
    case("transformers.optimization", "Adafactor", 3e-3, relative_step=False, scale_parameter=False),
    case("transformers.optimization", "Adafactor", 3e-3, relative_step=False, scale_parameter=False, beta1=0.9),
]


@dataclass
class OptimizerRun:
    """What a run left behind.

    Attributes:
        first: loss before the first step.
        last: loss after the last.
        density: active share at the end.
        updates: mask updates.
        nonzero: weights other than 0 outside the masks, over all steps.
        model: the trained model.

    """

    first: float
    last: float
    density: float
    updates: int
    nonzero: int
    model: nn.Module


def run_case(tried: OptimizerCase, *, exponent: float = 1.0, resume_at: int | None = None) -> OptimizerRun:
    """Train a small regression under an optimizer.

    Args:
        tried: optimizer.
        exponent: `StepSize.exponent`.
        resume_at: step after which everything is saved, and gone on with from the saved state in new objects.

    """
    config = DGMConfig(SCHEDULE, units=Units(size=1), step_size=StepSize(exponent=exponent), backend="dense")
    torch.manual_seed(0)
    model = _model()
    optimizer = tried.make(model)
    dgm = DGMController(model, optimizer, config, total_steps=STEPS, audit=False)
    first, nonzero = float(_loss(model, 10_000)), 0
    for step in range(STEPS):
        if step == resume_at:
            saved = _through_file([x.state_dict() for x in (model, optimizer, dgm)])
            dgm.close()
            model = _model()
            optimizer = tried.make(model)
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            dgm = DGMController(model, optimizer, config, total_steps=STEPS, state=saved[2], audit=False)
        _train(model, optimizer, dgm, step, tried.closure)
        dgm.advance()
        weights = dict(model.named_parameters())
        nonzero += sum(int(torch.count_nonzero(weights[f"{n}.weight"][~m])) for n, m in dgm.masks().items())
    dgm.close()
    return OptimizerRun(first, float(_loss(model, 10_000)), dgm.density, dgm.updates, nonzero, model)


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))


def _loss(model: nn.Module, seed: int) -> torch.Tensor:
    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(seed))
    return (model(x) - x[:, :4].sin()).square().mean()


def _train(model: nn.Module, optimizer: Any, dgm: DGMController, step: int, closure: bool) -> None:
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = _loss(model, step)
        value.backward()
        dgm.mask_gradients()
        return value

    with torch.compiler.set_stance("force_eager"):  # torchao's are compiled, which is a minute for each
        loss()  # SAM's closure is the second of its two evaluations
        if closure:
            optimizer.step(loss)
        else:
            optimizer.step()


def _through_file(states: list[Any]) -> list[Any]:
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    loaded: list[Any] = torch.load(file, weights_only=False)
    return loaded


def table(cases: Sequence[OptimizerCase]) -> str:
    """Return the table of docs/guides/optimizers.md for optimizers."""
    head = "| optimizer | settings | loss before | after, exponent 0 | after, exponent 1 | resumed = straight | state |"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *map(_row, cases)])


def _row(tried: OptimizerCase) -> str:
    scaled, plain = run_case(tried), run_case(tried, exponent=0.0)
    resumed = run_case(tried, resume_at=STEPS // 2 - 3)
    pairs = zip(scaled.model.parameters(), resumed.model.parameters(), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs)
    if scaled.nonzero or scaled.updates != 10:
        raise AssertionError(f"{tried}: {scaled}")
    name = f"{tried.library.split('.')[0]} `{tried.name}`" + " over `Adam`" * (tried.inner == "given")
    settings = ", ".join(f"`{key}={value}`" for key, value in (("lr", tried.lr), *tried.settings))
    losses = " | ".join(f"{loss:.3f}" for loss in (scaled.first, plain.last, scaled.last))
    return f"| {name} | {settings} | {losses} | {'yes' if same else 'no'} | {_states(tried)} |"


def _states(tried: OptimizerCase) -> str:
    """Return what is done with each state entry of a 64 x 64 weight, in words."""
    model = _model()
    optimizer = tried.make(model)
    if isinstance(optimizer, torch.optim.LBFGS):
        return "history cleared at updates"
    found = {path[1:]: str(rule) for (_, path), rule in fresh_state_rules(optimizer, model[0].weight).items()}
    return ", ".join(f"`{'.'.join(path)}`: {rule}" for path, rule in found.items()) or "none for single weights"
