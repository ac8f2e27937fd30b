"""The convolutions of a ResNet-50: their shapes, the three products by each backend, and the layer as a whole."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_estdgm.method._masks import sides
from lightning_estdgm.recipes.resnet import resnet50
from lightning_estdgm.sparse._conv_geometry import ConvGeometry
from lightning_estdgm.sparse.autotune._cases import DENSE, ConvCase, refusals
from lightning_estdgm.tools.bench.kernels._cases import attempt, timed_product
from lightning_estdgm.tools.bench.kernels._kernels_config import KernelsConfig
from lightning_estdgm.tools.bench.kernels._rows import PRODUCTS

ConvLayer = tuple[int, int, int, int, ConvGeometry]
"""Output channels, input channels, height and width of the input, geometry."""


def conv_rows(config: KernelsConfig, say: Callable[[str], None] = lambda text: None) -> Iterator[dict[str, Any]]:
    """Yield a row for each layer, block size, density and backend, in the first of the dtypes; `say` as in linear_rows.

    "count" is how often the net has the layer. Left out are layers whose channels a block size does not divide, and
    densities of less than one block.
    """
    told: set[str] = set()

    def say_once(text: str) -> None:
        if text not in told:
            told.add(text)
            say(text)

    device, dtype = torch.device(config.device), getattr(torch, config.dtypes[0])
    layers = conv_layers(config.image_size)
    if config.most_layers:
        layers = Counter(
            dict(sorted(layers.items(), key=lambda item: -_flops(1, *item[0]) * item[1])[: config.most_layers])
        )
    for (out, inner, height, width, geometry), count in layers.items():
        for block_size in config.block_sizes:
            rows, columns = sides(block_size)
            if out % rows or inner % columns:
                say_once(
                    f"convolution {inner} to {out} left out at block {block_size}: it does not divide the channels"
                )
                continue
            taps = math.prod(geometry.kernel_size) if block_size == 1 else 1
            blocks = (out // rows) * (inner // columns) * taps
            for density in config.densities:
                if density * blocks < 1:
                    say_once(
                        f"convolution {inner} to {out} left out at block {block_size}, density {density:g}: "
                        f"it has {blocks} blocks"
                    )
                    continue
                case = ConvCase(config.images, height, width, out, inner, geometry, block_size, density, dtype, device)
                shape: dict[str, Any] = {"count": count, "batch": config.images, "height": height, "width": width}
                shape |= {"out_channels": out, "in_channels": inner}
                shape |= {name: list(pair) for name, pair in asdict(geometry).items()}
                for name, reason in refusals(case).items():
                    if reason is not None:
                        say_once(f"backend {name} left out of some convolutions: it {reason}")
                        continue
                    products = partial(conv_products, case, name, config.rounds)
                    yield attempt("convolution", shape, case, name, products, config.rounds)


def conv_layers(image_size: int) -> Counter[ConvLayer]:
    """Return the maskable convolutions that a ResNet-50 applies to images of this size, and how often each.

    Example:
        >>> layers = conv_layers(224)
        >>> sum(layers.values()), layers[64, 64, 56, 56, ConvGeometry((3, 3), padding=(1, 1))]
        (52, 3)
    """
    found: Counter[ConvLayer] = Counter()

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d)
        height, width = inputs[0].shape[2:]
        pairs: Any = module.kernel_size, module.stride, module.padding, module.dilation
        found[module.out_channels, module.in_channels, height, width, ConvGeometry(*pairs)] += 1

    with torch.device("meta"):
        model = resnet50().eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.in_channels > 3:  # the stem sees three colours: dense
                module.register_forward_pre_hook(note)
        model(torch.empty(1, 3, image_size, image_size))
    return found


def conv_products(case: ConvCase, name: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Time Y, dX and dW by the operator and its autograd against ``F.conv2d`` and the library's gradients.

    With bias. Every result is compared with the dense one of the masked weight.

    Returns:
        Rows by product, as `product_row` makes them.
    """
    problem = case.problem()
    mask = case.topology().mask_over(problem.leaves[1].shape)
    flops = _flops(case.batch, case.out_channels, case.in_channels, case.height, case.width, case.geometry)

    def call_of(product: str, name: str) -> Callable[[], Tensor]:
        if product == "Y":
            return torch.no_grad()(lambda: problem.forward(name))
        leaf, y = problem.leaves[PRODUCTS.index(product) - 1], problem.forward(name)
        return lambda: torch.autograd.grad(y, leaf, problem.dy, retain_graph=True)[0]

    found = {}
    with torch.autocast(case.device.type, enabled=False):
        for index, product in enumerate(PRODUCTS):
            for position, leaf in enumerate(problem.leaves):
                leaf.requires_grad_(position == index - 1)
            calls = call_of(product, DENSE), call_of(product, name)
            found[product] = timed_product(*calls, mask if product == "dW" else None, flops, case, rounds)
    return found


def _flops(batch: int, out: int, inner: int, height: int, width: int, geometry: ConvGeometry) -> float:
    """Return the FLOPs of one of the three products, dense; taps on the padding counted too."""
    out_h, out_w = geometry.output_size(height, width)
    return 2.0 * batch * out_h * out_w * out * inner * geometry.kernel_size[0] * geometry.kernel_size[1]
