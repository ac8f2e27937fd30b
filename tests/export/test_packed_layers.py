"""Packed layers: against float64 for every unit, type and number of tokens; threads; torch.export and AOTInductor."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.packed_layers import TOKENS, UNITS, masked_weight, stored
from lightning_estdgm.export import PackedLinear, operator_library, packed
from lightning_estdgm.sparse._packed_weight import DTYPES, pack_weight


def _layer(unit, dtype=torch.float32, bias=True, **sizes):
    weight = masked_weight(unit, **sizes)
    bias = torch.randn(weight.shape[0], generator=torch.Generator().manual_seed(1)) if bias else None
    return PackedLinear(pack_weight(weight, unit, dtype), bias), stored(weight, dtype), bias


def _input(tokens, features, seed=2):
    return torch.randn(tokens, features, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_forward_is_that_of_the_stored_weight(unit, dtype):
    for bias in (True, False):
        layer, weight, added = _layer(unit, dtype, bias)
        for tokens in TOKENS:
            x = _input(tokens, weight.shape[1])
            expected = F.linear(x.double(), weight, None if added is None else added.double())
            torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("unit", [(1, 1), (4, 4), (8, 1), (16, 16), (64, 64)], ids=str)
def test_threads_do_not_change_a_bit(unit):
    layer, weight, _ = _layer(unit, rows=12, columns=12)
    before = torch.get_num_threads()
    try:
        for tokens in TOKENS:
            x = _input(tokens, weight.shape[1])
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(layer(x))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("unit", "inputs"), [((1, 1), 1000), ((1, 1), 3200), ((16, 16), 1024), ((32, 32), 1024)], ids=str
)
def test_few_tokens_of_wide_layers_in_several_threads(unit, inputs, dtype):
    """Enough values for threads to share them, and inputs for single weights to be summed in several parts."""
    layer, weight, bias = _layer(unit, dtype, rows=160 // unit[0], columns=inputs // unit[1])
    before = torch.get_num_threads()
    try:
        for tokens in (1, 2, 3, 48):
            x, results = _input(tokens, weight.shape[1]), []
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                results.append(layer(x))
            expected = F.linear(x.double(), weight, bias.double())
            torch.testing.assert_close(results[0].double(), expected, rtol=1e-5, atol=1e-4)
            assert all(torch.equal(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(before)


def test_shapes_strides_and_dtypes_of_inputs():
    layer, weight, _ = _layer((16, 16))
    features = weight.shape[1]
    x = _input(12, features)
    y = layer(x)
    assert torch.equal(layer(x.view(3, 4, features)), y.view(3, 4, -1))
    assert torch.equal(layer(x[0]), layer(x[:1])[0])
    assert torch.equal(layer(x.t().contiguous().t()), y)
    assert torch.equal(layer(torch.stack([x, x], 1)[:, 0]), y)
    assert layer(x[:0]).shape == (0, weight.shape[0])
    assert layer(x.bfloat16()).dtype is torch.bfloat16


def test_nan_and_infinity_reach_their_outputs_only():
    for unit in ((1, 1), (4, 4), (16, 16), (64, 64)):
        layer, weight, _ = _layer(unit)
        for tokens in (1, 20):
            x = _input(tokens, weight.shape[1])
            x[:, 3] = torch.inf
            reached = weight[:, 3] != 0
            assert torch.isfinite(layer(x)[:, ~reached]).all()
            assert not torch.isfinite(layer(x)[:, reached]).any()


def test_gradient_is_refused_where_it_is_asked_for():
    layer, weight, _ = _layer((16, 16))
    x = _input(4, weight.shape[1]).requires_grad_()
    y = layer(x)
    with pytest.raises(RuntimeError, match="for inference only and have no gradient"):
        y.sum().backward()
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_wrong_inputs_are_named():
    layer, weight, _ = _layer((16, 16))
    with pytest.raises(RuntimeError, match=rf"expected x of shape \[\.\.\., {weight.shape[1]}\]"):
        layer(torch.ones(2, 3))
    broken, *_ = _layer((16, 16))
    broken.values = broken.values[:-1]
    with pytest.raises(RuntimeError, match="do not fit a weight of"):
        broken(_input(1, weight.shape[1]))


def _network():
    generator = torch.Generator().manual_seed(5)
    model = nn.Sequential(nn.Linear(80, 208), nn.GELU(), nn.Linear(208, 48))
    for layer, unit in zip((model[0], model[2]), ((16, 16), (1, 1)), strict=True):
        mask = torch.rand(layer.out_features // unit[0], layer.in_features // unit[1], generator=generator) < 0.2
        mask[0, 0] = True
        layer.weight.data *= mask.repeat_interleave(unit[0], 0).repeat_interleave(unit[1], 1)
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exported_program_stays_packed(tmp_path, dtype):
    model = packed(_network(), dtype=dtype)
    program = torch.export.export(model, (_input(5, 80),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert sum("packed_linear" in str(node.target) for node in program.graph.nodes) == 2
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    assert not any(tensor.numel() >= 80 * 208 for tensor in loaded.state_dict.values())
    for tokens in (2, 40):
        assert torch.equal(loaded.module()(_input(tokens, 80)), model(_input(tokens, 80)))


# Torch's own import of its compiler uses what it has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles_inline:UserWarning")  # of torch 2.6
def test_aot_inductor_package_stays_packed(tmp_path):
    model = packed(_network())
    program = torch.export.export(model, (_input(5, 80),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    compiled = torch._inductor.aoti_load_package(path)
    for tokens in (2, 40):
        torch.testing.assert_close(compiled(_input(tokens, 80)), model(_input(tokens, 80)), rtol=1e-5, atol=1e-5)


def test_library_is_a_file_that_registers_the_operator():
    assert operator_library().is_file()
    assert torch.ops.estdgm.packed_linear.default._schema.name == "estdgm::packed_linear"
