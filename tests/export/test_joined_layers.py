"""Packed layers of one input, joined into one call of the operator in a program."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_estdgm.export import packed
from lightning_estdgm.export._joined_layers import with_joined_layers
from lightning_estdgm.export._program import exported_program
from lightning_estdgm.export.targets._protocol import ExportInput
from lightning_estdgm.recipes._decoder_block import DecoderBlock
from lightning_estdgm.sparse._packed_weight import DTYPES

WIDTH = 64


def sparse_(model: nn.Module, side: int = 16) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for matrix in (parameter for parameter in model.parameters() if parameter.dim() == 2):
        units = torch.rand(matrix.shape[0] // side, matrix.shape[1] // side, generator=generator) < 0.3
        units[0, 0] = True
        matrix.data *= units.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return model.eval()


def calls(model: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Return how many calls a program has, and how many with layers joined; the results have to be the same bits."""
    x = torch.randn(3, 5, WIDTH)
    given = ExportInput(packed(model, dtype=dtype), (x,), {}, "shape", "fp32")
    program, _ = exported_program(given)
    joined = with_joined_layers(program, given)
    with torch.no_grad():
        for batch, tokens in ((3, 5), (2, 1), (1, 70)):
            x = torch.randn(batch, tokens, WIDTH)
            assert torch.equal(joined.module()(x), program.module()(x))
    bytes_held = [sum(t.nbytes for t in p.state_dict.values()) for p in (joined, program)]
    assert bytes_held[0] <= bytes_held[1], "no layer is held twice"
    one, other = (
        sum("packed_linear" in str(node.target) for node in p.graph.nodes if node.op == "call_function")
        for p in (program, joined)
    )
    return one, other


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_keys_and_values_are_one_call(dtype: torch.dtype) -> None:
    assert calls(sparse_(DecoderBlock(WIDTH, 2)), dtype) == (6, 4)


class Heads(nn.Module):
    """Layers of one input, with biases or without, of several sizes."""

    def __init__(self, biases: tuple[bool, bool, bool]) -> None:
        super().__init__()
        sizes = (WIDTH, 32, 16)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, n, bias) for n, bias in zip(sizes, biases, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([head(x).relu() for head in self.heads], -1)


def test_outputs_of_any_size_and_biases_that_all_have() -> None:
    assert calls(sparse_(Heads((True, True, True)))) == (3, 1)
    assert calls(sparse_(Heads((True, False, True)))) == (3, 2)


def test_single_weights_stay_as_they_are() -> None:
    model = Heads((True, True, True)).eval()
    for head in model.heads:
        nn.init.sparse_(head.weight, 0.9)
    assert calls(model) == (3, 3)


class Twice(Heads):
    """One layer called again on another input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[0](super().forward(x)[..., :WIDTH])  # type: ignore[no-any-return]


def test_a_layer_that_is_called_twice_is_held_once() -> None:
    assert calls(sparse_(Twice((True, True, True)))) == (4, 3)


class Changed(Heads):
    """Its input is another one at the second call."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        one = self.heads[0](x)
        x[..., 0].add_(1)
        return one + self.heads[1](x).repeat(1, 1, 2)  # type: ignore[no-any-return]


def test_an_input_that_changes_between_calls() -> None:
    model = sparse_(Changed((True, True, True)))
    del model.heads[2]  # type: ignore[operator]
    assert calls(model) == (2, 2)


class Viewed(Heads):
    """Its outputs are taken as they lie in memory, which a part of a larger one is not."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([head(x).view(-1) for head in self.heads])


def test_a_view_that_needs_the_whole_memory() -> None:
    assert calls(sparse_(Viewed((True, True, True)))) == (3, 3)


def test_a_network_without_such_layers_is_the_program_that_it_was() -> None:
    model = sparse_(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)))
    given = ExportInput(packed(model), (torch.randn(2, WIDTH),), {}, "batch", "fp32")
    program, _ = exported_program(given)
    assert with_joined_layers(program, given) is program
