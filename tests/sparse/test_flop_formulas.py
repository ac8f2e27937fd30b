"""FLOPs that torch counts for sparse layers: those of the active units, and of the whole where a product is dense."""

import pytest
import torch
from lightning.fabric.utilities.throughput import measure_flops
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lightning_estdgm import DGMConfig, DGMController, EstDgm, Units
from lightning_estdgm.export import packed
from lightning_estdgm.sparse._conv import masked_conv2d
from lightning_estdgm.sparse._conv_geometry import ConvGeometry
from lightning_estdgm.sparse._expert_topology import ExpertTopology
from lightning_estdgm.sparse._experts import masked_experts
from lightning_estdgm.sparse._linear import masked_linear
from lightning_estdgm.sparse._packed_linear import gather, packed_linear
from lightning_estdgm.sparse._topology import BlockTopology

ROWS, OUT, IN = 12, 64, 32
WHOLE = 2 * ROWS * OUT * IN  # FLOPs of one product


def counted(function):
    """Return what torch counts in a forward and its backward."""
    counter = FlopCounterMode(display=False)
    with counter:
        function().square().mean().backward()
    return counter.get_total_flops()


def topology(share=4, block_size=4):
    mask = torch.zeros(OUT // block_size, IN // block_size, dtype=torch.bool)
    mask.view(-1)[::share] = True
    return BlockTopology.from_mask(mask, block_size)


def operands(*shapes):
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"backend": "native"}, 3 * WHOLE / 4),
        ({"backend": "cpu"}, 3 * WHOLE / 4),
        ({"backend": "reference"}, 3 * WHOLE),
        ({"backend": "native", "dense_grad": True}, 2 * WHOLE / 4 + WHOLE),
        ({"backend": "native", "frozen": True}, 2 * WHOLE + WHOLE / 4),
    ],
    ids=str,
)
def test_a_linear_layer(settings, expected):
    block_size = 16 if settings["backend"] == "cpu" else 4
    x, weight, bias = operands((ROWS, IN), (OUT, IN), (OUT,))
    assert counted(lambda: masked_linear(x, weight, bias, topology(block_size=block_size), **settings)) == expected


def test_a_convolution_as_torch_counts_a_dense_one():
    geometry = ConvGeometry((3, 3), (2, 2), (1, 1), (1, 1))
    x, weight = operands((2, IN, 8, 8), (OUT, IN, 3, 3))
    dense = counted(lambda: F.conv2d(x, weight, stride=2, padding=1))
    sparse = counted(lambda: masked_conv2d(x, weight, None, topology(), geometry, backend="native"))
    assert sparse == dense / 4 == 3 * 2 * 2 * 16 * OUT * IN * 9 / 4


def test_experts_count_for_the_rows_that_they_have():
    masks = torch.zeros(3, OUT // 4, IN // 4, dtype=torch.bool)
    masks[0, :, 0] = masks[1, :, :4] = masks[2] = True  # an eighth, a half, all
    x, weight = operands((ROWS, IN), (3, OUT, IN))
    stack, counts = ExpertTopology.from_mask(masks.flatten(0, 1), 3, block_size=4), torch.tensor([8, 4, 0])
    product = 2 * OUT * IN * (8 / 8 + 4 / 2)
    assert counted(lambda: masked_experts(x, weight, counts, stack, backend="native")) == 3 * product


@pytest.mark.parametrize(("backend", "share"), [("native", 4), ("dense", 1)])
def test_a_packed_layer(backend, share):
    x, weight = operands((ROWS, IN), (OUT, IN))
    values = gather(weight.detach(), topology()).requires_grad_()
    assert counted(lambda: packed_linear(x, values, topology(), backend=backend)) == 3 * WHOLE / share


def test_a_served_layer():
    layer = nn.Linear(IN, OUT)
    with torch.no_grad():
        layer.weight[16:] = 0
    served = packed(nn.Sequential(layer))
    counter = FlopCounterMode(display=False)
    with counter:
        served(torch.randn(3, ROWS // 3, IN))
    assert counter.get_total_flops() == WHOLE / 4


def test_a_compilers_estimate_is_that_of_the_whole():
    """Index lists of fake tensors have no values."""
    with FakeTensorMode() as fake:
        x, weight = fake.from_tensor(torch.randn(ROWS, IN)), fake.from_tensor(torch.randn(OUT, IN))
        lists = topology()
        for name in ("row_ptr", "col_idx", "col_ptr", "row_idx"):
            object.__setattr__(lists, name, fake.from_tensor(getattr(lists, name)))
        counter = FlopCounterMode(display=False)
        with counter:
            masked_linear(x, weight, None, lists, backend="native")
    assert counter.get_total_flops() == WHOLE


def test_a_masked_model_counts_what_it_computes():
    """By torch, and by Lightning's `measure_flops`; the controller says the same share of its layers."""
    model = nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(), nn.Linear(OUT, OUT), nn.ReLU(), nn.Linear(OUT, 2))
    x = torch.randn(ROWS, IN)
    dense = measure_flops(model, lambda: model(x), torch.Tensor.sum)
    config = DGMConfig(EstDgm.low_density(0.2, update_every=50), units=Units(size=4), backend="native")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with DGMController(model, optimizer, config, total_steps=100, audit=False) as dgm:
        while dgm.observing:  # gradients of weights are whole
            model(x).sum().backward()
            dgm.mask_gradients()
            optimizer.step()
            dgm.advance()
        active = {name: share * model[int(name)].weight.numel() for name, share in dgm.layer_densities().items()}
        found = measure_flops(model, lambda: model(x), torch.Tensor.sum)
    head = 3 * 2 * ROWS * OUT * 2
    assert dense == 2 * WHOLE + 3 * 2 * ROWS * OUT * OUT + head  # the first has no gradient of its input
    assert found == 2 * 2 * ROWS * active["0"] + 3 * 2 * ROWS * active["2"] + head
