"""Optimizers for tests whose steps depend on their count."""

import torch


class CountedAverage(torch.optim.SGD):
    """A mean of the gradients that is unbiased in the state itself, and steps that rise with the count."""

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                left = 0.9 ** state["count"]
                mean = state.setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 0.1 / (1 - left))
                p.sub_(mean, alpha=group["lr"] * (1 - left) ** 2)
