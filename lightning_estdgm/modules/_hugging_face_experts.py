"""Experts of transformers: how they are recognised, their forward by `ExpertProduct`, what computes them by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_estdgm.modules._expert_adapter import ExpertProduct
from lightning_estdgm.modules._kinds import own_class

HUGGING_FACE_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
_MARKS = ("is_transposed", "is_concatenated", "has_gate")  # set by use_experts_implementation
_DENSE_FORMS = {"grouped_mm": "grouped", "eager": "loop", None: "loop"}


def is_hugging_face(module: nn.Module) -> bool:
    """Whether a module has what transformers' ``use_experts_implementation`` sets."""
    return all(mark in vars(module) for mark in _MARKS)


def why_dense(module: nn.Module) -> str:
    """Return the reason why no sparse operator can take the place of a module's forward; empty where one can."""
    # A class of someone's own may have a forward of its own.
    own = own_class(module)
    return "" if own.__module__.partition(".")[0] == "transformers" else f"no sparse operator for {own.__name__}"


def dense_form(module: Any) -> str:
    """Return how a module computes its experts by itself, as of `ExpertCase`; empty where it is not known."""
    return _DENSE_FORMS.get(getattr(getattr(module, "config", None), "_experts_implementation", None), "")


def hugging_face_forward(
    module: Any, product: ExpertProduct, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return what ``grouped_mm_experts_forward`` does.

    Source: transformers, ``integrations/moe.py``.
    """
    chosen, count = top_k_index.shape[-1], module.num_experts
    experts, order = top_k_index.reshape(-1).sort(stable=True)
    # Indices past the last expert stand for experts of other ranks: they come last, and add nothing.
    here = experts < count
    counts = experts.new_zeros(count + 1).scatter_add(0, experts.clamp(max=count), torch.ones_like(experts))[:count]
    inside = experts.clamp(max=count - 1)

    def biased(name: str, x: Tensor) -> Tensor:
        y = product(name, x, counts)
        return y + getattr(module, f"{name}_bias")[inside].to(y.dtype) if module.has_bias else y

    y = biased("gate_up_proj" if module.has_gate else "up_proj", hidden_states[order // chosen])
    y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    y = biased("down_proj", y)
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    y = y.where(here.unsqueeze(-1), 0.0)
    # Each pair of token and expert has its own row: a sum over them is deterministic, unlike index_add.
    pairs = torch.zeros_like(y).index_copy(0, order, y)
    return pairs.view(-1, chosen, y.shape[-1]).sum(1).to(hidden_states.dtype)
