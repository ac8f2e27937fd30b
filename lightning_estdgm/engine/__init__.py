"""The method at work on one model: masks drawn and updated, gradients observed and masked, steps scaled. No Lightning.

`_controller` is what training loops call. It assembles `_masked_model` (all masked weights, each a `_masked_weight`),
`_step_hooks` (around the optimizers' steps) and `_dispatch` (dense or sparse backend of each layer). Mathematics
without state belongs in `method`, layouts of weights over ranks in `distributed`.
"""
