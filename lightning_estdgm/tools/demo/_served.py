"""What a trained network of the demo costs to serve."""

from __future__ import annotations

import time

import torch

from lightning_estdgm.export import packed
from lightning_estdgm.recipes.gpt import GPT

_TOKENS, _REPEATS = 64, 3


def seconds_a_token(model: GPT, is_sparse: bool) -> float | None:
    """Return the seconds that a token takes, generated alone with a key-value cache; the best of some texts.

    Args:
        model: trained network.
        is_sparse: whether it is served packed, with its active weights only.

    Returns:
        Seconds; None where a sparse network cannot be packed here, such as without a compiler.

    """
    try:
        served = packed(model) if is_sparse else model
    except RuntimeError:
        return None
    prompt = torch.zeros(1, 1, dtype=torch.long)
    count = min(_TOKENS, model.context - 1)
    was_training = model.training
    served.eval()
    seconds = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        served.generate(prompt, count)  # type: ignore[operator]
        seconds.append((time.perf_counter() - began) / count)
    model.train(was_training)
    return min(seconds)
