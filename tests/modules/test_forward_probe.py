"""The probe of a layer's forward."""

import pytest
import torch
from torch import nn

from helpers.swapped_layers import candidate
from lightning_estdgm.modules._forward_probe import ForwardProbe, Image


@pytest.mark.parametrize(
    ("module", "x", "positions", "image"),
    [
        (nn.Conv2d(4, 8, 3, stride=2), torch.randn(5, 4, 9, 7), 5 * 4 * 3, Image(5, 9, 7, False)),
        (
            nn.Conv2d(4, 8, 3),
            torch.randn(5, 4, 9, 7).contiguous(memory_format=torch.channels_last),
            5 * 7 * 5,
            Image(5, 9, 7, True),
        ),
        (nn.Conv2d(4, 8, 3), torch.randn(4, 9, 7), 7 * 5, Image(1, 9, 7, False)),
        (nn.Conv1d(4, 8, 3), torch.randn(5, 4, 9), 5 * 7, Image(5, 1, 9, False)),
        (nn.Conv2d(4, 8, 3, groups=2), torch.randn(5, 4, 9, 7), 5 * 7 * 5, None),
        (nn.ConvTranspose2d(4, 8, 2, stride=2), torch.randn(5, 4, 9, 7), 5 * 9 * 7, None),
        (nn.Linear(4, 8), torch.randn(5, 3, 4), 15, None),
    ],
)
def test_a_probe_sees_what_a_layer_is_given(module, x, positions, image):
    probe = ForwardProbe(candidate(module))
    module.register_forward_hook(probe, with_kwargs=True)
    module(x)
    assert (probe.positions, probe.dtype, probe.image) == (positions, torch.float32, image)
    by_name = ForwardProbe(candidate(module))
    module.register_forward_hook(by_name, with_kwargs=True)
    module(input=x)
    assert vars(by_name).keys() == vars(probe).keys()
    assert all(vars(by_name)[name] == vars(probe)[name] for name in ("positions", "dtype", "image"))


@pytest.mark.parametrize(
    ("module", "x", "output", "positions"),
    [
        (nn.Linear(4, 8), torch.randn(5, 3, 4), torch.tensor(1.0), 15),  # the head's loss
        (nn.Linear(4, 8), torch.randn(5, 3, 4), (torch.arange(9), {"y": [torch.randn(7, 2)]}), 7),
        (nn.Conv2d(4, 8, 3, padding=1), torch.randn(5, 4, 9, 7), torch.tensor(1.0), 5 * 9 * 7),
        (nn.Conv2d(4, 8, 3), torch.randn(5, 4, 9, 7), (torch.randn(5, 8, 7, 5), torch.ones(5, 1, 7, 5)), 5 * 7 * 5),
        (nn.Linear(4, 8), torch.randn(5, 3, 4), torch.randn(5, 0), 0),
        (nn.Linear(4, 8), "words", None, 0),
    ],
)
def test_a_probe_never_fails_whatever_a_forward_of_ones_own_returns(module, x, output, positions):
    probe = ForwardProbe(candidate(module))
    probe(module, (x,), {}, output)
    assert probe.positions == positions


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_probe_counts_the_rows_of_nested_tensors(layout):
    module = nn.Linear(4, 8)
    probe = ForwardProbe(candidate(module))
    module.register_forward_hook(probe, with_kwargs=True)
    module(torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(7, 4)], layout=layout))
    assert (probe.positions, probe.dtype) == (10, torch.float32)
