"""Models with packed layers: a GPT and convolutions against the model, files, and what cannot be packed."""

import copy
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer
from torch import nn

from helpers import exported
from helpers.exact import differences
from helpers.models import NO_VALIDATION_LOADER
from lightning_estdgm import DGMCallback, DGMConfig, Units
from lightning_estdgm.export import (
    ExportError,
    PackedConv2d,
    PackedLinear,
    export_model,
    load_packed,
    packed,
    save_packed,
)
from lightning_estdgm.export._export import _difference
from lightning_estdgm.modules._packed_forward import PackedForward
from lightning_estdgm.recipes import ByteGPT


def _sparse_(layer, unit, density=0.2, seed=0):
    """Zero whole units, all taps of a convolution together, as w * mask does: with -0.0."""
    generator = torch.Generator().manual_seed(seed)
    out, inputs = layer.weight.shape[:2]
    mask = (torch.rand(out // unit[0], inputs // unit[1], generator=generator) < density).float()
    mask[0, 0] = 1
    mask = mask.repeat_interleave(unit[0], 0).repeat_interleave(unit[1], 1)
    with torch.no_grad():
        layer.weight.mul_(mask.view(out, inputs, *[1] * (layer.weight.dim() - 2)))
    return layer


def _trained_gpt(tmp_path):
    torch.manual_seed(0)
    model = ByteGPT(width=64, layers=2, heads=2, context=16)
    data = torch.utils.data.TensorDataset(torch.randint(0, 256, (8, 16)), torch.randint(0, 256, (8, 16)))
    trainer = Trainer(
        max_steps=8,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[DGMCallback(DGMConfig(units=Units(size=16)))],
    )
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=1))
    return model


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_trained_gpt_is_packed_and_computes_the_same(tmp_path):
    model = _trained_gpt(tmp_path)
    small = packed(model)
    layers = [module for module in small.modules() if isinstance(module, PackedLinear)]
    assert layers
    assert all(layer.sides == [16, 16] for layer in layers)
    x = torch.randint(0, 256, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(small(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert model.trainer is not None  # the model is left alone
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    weights = {id(p) for p in model.parameters()}
    assert not any(p.requires_grad or id(p) in weights for p in small.parameters())


@pytest.mark.filterwarnings(NO_VALIDATION_LOADER, "ignore:these layers have zeros but:UserWarning")
@pytest.mark.parametrize("unit", [1, (4, 1)], ids=str)
@pytest.mark.parametrize("kind", exported.PACKED_IN_TRAINING)
def test_a_model_that_was_trained_packed_is_packed(kind, unit, tmp_path):
    """Layers of one shape, whose whole weights may lie in the same memory one after the other, stay two."""
    module, x = exported.trained_packed(kind, unit)
    before = exported.parts(module)
    small = packed(module)
    assert differences(exported.parts(module), before) == []
    masked = [name for name, layer in module.named_modules() if isinstance(layer, PackedForward)]
    grouped = [name for name in masked if getattr(module.get_submodule(name), "groups", 1) > 1]
    assert {type(small.get_submodule(name)) for name in masked if name not in grouped} <= {PackedLinear, PackedConv2d}
    assert {type(small.get_submodule(name)) for name in grouped} <= {nn.Conv2d}
    save_packed(small, tmp_path / "net.packed")
    again = load_packed(tmp_path / "net.packed", copy.deepcopy(module))  # whose dense layers may be packed, too
    assert not [layer for layer in again.modules() if isinstance(layer, PackedForward)]
    with torch.no_grad():
        torch.testing.assert_close(small(x), module(x), rtol=1e-4, atol=1e-5)
        assert torch.equal(again(x), small(x))


@pytest.mark.parametrize(
    ("unit", "geometry"),
    [
        ((16, 16), {"kernel_size": 3, "padding": 1}),
        ((1, 1), {"kernel_size": (3, 2), "stride": 2, "dilation": (1, 2)}),
        ((4, 4), {"kernel_size": 1, "stride": (2, 1)}),
        ((16, 16), {"kernel_size": 3, "padding": "same"}),
        ((8, 8), {"kernel_size": 1, "padding": 1, "bias": False}),
    ],
    ids=str,
)
def test_convolution_is_that_of_torch(unit, geometry):
    torch.manual_seed(0)
    layer = _sparse_(nn.Conv2d(32, 48, **geometry), unit)
    small = packed(layer)
    assert isinstance(small, PackedConv2d)
    assert small.sides == list(unit)
    for images in (torch.randn(2, 32, 9, 8), torch.randn(32, 9, 8), torch.randn(2, 32, 9, 8)[:, :, ::2]):
        expected = copy.deepcopy(layer).double()(images.double())
        torch.testing.assert_close(small(images).double(), expected, rtol=1e-5, atol=1e-5)


def test_convolutions_in_a_program_take_images_of_any_size(tmp_path):
    torch.manual_seed(0)
    layers = (
        _sparse_(nn.Conv2d(16, 32, 3, padding=1, dilation=2, stride=2), (16, 16)),
        _sparse_(nn.Conv2d(32, 32, 1, stride=2), (1, 1)),
        _sparse_(nn.Conv2d(32, 16, (3, 1), padding="same"), (4, 4)),
    )
    model = nn.Sequential(*layers).eval()
    sizes = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(packed(model), (torch.randn(2, 16, 19, 23),), dynamic_shapes=(sizes,))
    for shape in ((3, 16, 19, 23), (2, 16, 30, 31)):
        images = torch.randn(shape)
        torch.testing.assert_close(program.module()(images), model(images), rtol=1e-4, atol=1e-5)
    assert packed(model)(images[:0]).shape == model(images[:0]).shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_file_brings_the_model_back_without_its_dense_weights(tmp_path, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(_sparse_(nn.Linear(256, 256), (16, 16), 0.1), nn.LayerNorm(256), nn.Linear(256, 8))
    small = packed(model, dtype=dtype)
    save_packed(small, tmp_path / "model.packed")
    assert (tmp_path / "model.packed").stat().st_size < 0.25 * 256 * 256 * 4
    with torch.device("meta"):
        fresh = nn.Sequential(nn.Linear(256, 256), nn.LayerNorm(256), nn.Linear(256, 8))
    loaded = load_packed(tmp_path / "model.packed", fresh)
    x = torch.randn(5, 256)
    assert torch.equal(loaded(x), small(x))
    assert not any(t.is_meta or t.requires_grad for t in (*loaded.parameters(), *loaded.buffers()))


def test_model_that_is_one_layer_goes_through_a_file(tmp_path):
    layer = packed(_sparse_(nn.Linear(64, 64), (1, 1)))
    save_packed(layer, tmp_path / "layer.packed")
    x = torch.randn(3, 64)
    assert torch.equal(load_packed(tmp_path / "layer.packed", nn.Linear(64, 64))(x), layer(x))


def test_files_of_something_else_are_named(tmp_path):
    save_packed(packed(nn.Sequential(_sparse_(nn.Linear(64, 64), (16, 16)))), tmp_path / "model.packed")
    with pytest.raises(ValueError, match=r"a layer '0' of shape \[64, 64\] in the model, got one of shape \[64, 32\]"):
        load_packed(tmp_path / "model.packed", nn.Sequential(nn.Linear(32, 64)))
    content = torch.load(tmp_path / "model.packed")
    torch.save({**content, "version": 1}, tmp_path / "older.packed")
    with pytest.raises(ValueError, match=r"a packed model of version 2, got 1 in .*; export the model anew"):
        load_packed(tmp_path / "older.packed", nn.Sequential(nn.Linear(64, 64)))
    torch.save({"x": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no packed model"):
        load_packed(tmp_path / "other.pt", nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"expected a model that export\.packed has returned"):
        save_packed(nn.Linear(2, 2), tmp_path / "x")


def test_model_without_zeros_is_said():
    with pytest.warns(UserWarning, match="no layer was packed"):
        packed(nn.Linear(32, 32))


def test_layers_that_cannot_be_packed_are_named():
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict({"own": _sparse_(Own(32, 32), (1, 1)), "plain": _sparse_(nn.Linear(32, 32), (1, 1))})
    with pytest.warns(UserWarning, match=r"stay dense: own \(no sparse operator for Own, density 0\.\d+\)"):
        small = packed(model)
    assert type(small["own"]) is Own
    assert isinstance(small["plain"], PackedLinear)


def test_no_zero_is_negative_and_the_model_is_left_alone():
    layer = _sparse_(nn.Linear(64, 64), (1, 1), density=0.95)  # too few zeros: it stays dense
    other = _sparse_(nn.Linear(64, 64), (16, 16))
    model = nn.Sequential(layer, other)
    small = packed(model)
    for tensor in (*small.parameters(), *small.buffers()):
        assert not (torch.signbit(tensor) & (tensor == 0)).any()
    assert torch.signbit(layer.weight[layer.weight == 0]).any()


def test_shared_layers_stay_shared():
    layer = _sparse_(nn.Linear(64, 64), (16, 16))
    small = packed(nn.Sequential(layer, nn.ReLU(), layer))
    assert small[0] is small[2]
    assert isinstance(small[0], PackedLinear)


def test_encoder_layer_computes_the_same():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True).eval()
    _sparse_(model.linear1, (16, 16))
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        torch.testing.assert_close(packed(model)(x), model(x), rtol=1e-4, atol=1e-5)


def test_int8_changes_a_layer_by_less_than_a_hundredth():
    torch.manual_seed(0)
    layer = _sparse_(nn.Linear(256, 256), (16, 16))
    x = torch.randn(64, 256)
    expected = F.linear(x, layer.weight, layer.bias)
    assert (packed(layer, dtype=torch.int8)(x) - expected).norm() < 0.01 * expected.norm()


class _Named(nn.Module):
    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)


class _Doubled(_Named):
    def forward(self, x):
        return F.linear(self.b(x), self.a.weight * 2)


class _Chain(_Named):
    def forward(self, x):
        return self.b(self.a(x))


def test_a_layer_with_the_users_hooks_stays_and_is_named():
    model = _Chain(a=_sparse_(nn.Linear(64, 64), (16, 16)), b=_sparse_(nn.Linear(64, 64), (16, 16)))
    model.a.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.warns(UserWarning, match=r"stay dense: a \(it has forward hooks"):
        small = packed(model)
    x = torch.randn(3, 64)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    assert isinstance(small.b, PackedLinear)


def test_layers_of_one_weight_hold_it_once(tmp_path):
    model = _Chain(a=_sparse_(nn.Linear(256, 256), (1, 1)), b=nn.Linear(256, 256))
    alone = packed(nn.Sequential(model.a))
    model.b.weight = model.a.weight
    small = packed(model)
    assert small.a.values.data_ptr() == small.b.values.data_ptr()
    save_packed(small, tmp_path / "two")
    save_packed(alone, tmp_path / "one")
    assert (tmp_path / "two").stat().st_size < 1.2 * (tmp_path / "one").stat().st_size
    loaded = load_packed(tmp_path / "two", _Chain(a=nn.Linear(256, 256), b=nn.Linear(256, 256)))
    assert loaded.a.values.data_ptr() == loaded.b.values.data_ptr()
    x = torch.randn(3, 256)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_weight_that_the_model_reads_itself_is_refused_in_words(tmp_path):
    model = _Doubled(a=_sparse_(nn.Linear(64, 64), (16, 16)), b=_sparse_(nn.Linear(64, 64), (16, 16)))
    with pytest.raises(AttributeError, match="has to call the layer itself"):
        packed(model)(torch.randn(3, 64))
    with pytest.raises(ExportError, match="what packed has written fails on the example: AttributeError: a"):
        export_model(model, torch.randn(3, 64), "packed", tmp_path / "net")
    assert not any(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:these layers have zeros but:UserWarning")  # the other of two
def test_sparse_weights_of_other_layers_are_named():
    lstm = nn.LSTM(64, 64)
    with torch.no_grad():
        lstm.weight_hh_l0.mul_(torch.rand(256, 64) < 0.1)
    model = nn.Sequential(_sparse_(nn.Linear(64, 64), (16, 16)), lstm)
    with pytest.warns(UserWarning, match=r"stay dense: 1.weight_hh_l0 \(of LSTM, density 0\.(0|1)"):
        packed(model)
    with pytest.warns(UserWarning, match="no layer was packed: none of the others has zeros enough"):
        packed(lstm)


def test_a_layer_with_complex_weights_stays_and_is_named(tmp_path):
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.real = _sparse_(nn.Linear(64, 64), (1, 1))
            self.layer = _sparse_(nn.Linear(64, 64, dtype=torch.complex64), (1, 1))

        def forward(self, x):
            return self.layer(self.real(x).to(torch.complex64))

    model, x = Complex(), torch.randn(2, 64)
    with pytest.warns(UserWarning, match=r"stay dense: layer \(complex weights, density"):
        small = packed(model)
    torch.testing.assert_close(small(x), model(x))


def test_the_check_of_an_export_sees_imaginary_parts():
    model = torch.ones(2, dtype=torch.complex64)
    assert _difference(model + 3j, model) == (3.0, 1.0)


def test_a_convolution_that_computes_in_its_own_way_stays_and_is_named():
    def seamless(self, x, weight, bias):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    layer = _sparse_(nn.Conv2d(64, 64, 3), (1, 1))
    layer._conv_forward = MethodType(seamless, layer)
    model = nn.Sequential(_sparse_(nn.Conv2d(64, 64, 1), (1, 1)), layer)
    with pytest.warns(UserWarning, match=r"stay dense: 1 \(no sparse operator for a _conv_forward that is not torch's"):
        small = packed(model)
    x = torch.randn(1, 64, 5, 5)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_encoder_with_a_mask_of_padding_computes_the_same():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.TransformerEncoder(layer, 1).eval()
    for linear in (model.layers[0].linear1, model.layers[0].linear2):
        _sparse_(linear, (1, 1))
    x, padding = torch.randn(2, 5, 64), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected, found = model(x, src_key_padding_mask=padding), packed(model)(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], expected[~padding], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "buffer", [torch.ones(1).expand(64), torch.zeros(4).to(torch.float8_e4m3fn)], ids=["expanded", "float8"]
)
def test_buffers_that_take_no_sum_in_place_are_copied(buffer):
    model = nn.Sequential(_sparse_(nn.Linear(64, 64), (1, 1)), nn.Linear(64, 2))
    del model[1].weight  # a layer whose weight another one makes
    model.register_buffer("kept", buffer)
    small = packed(model)
    assert isinstance(small[0], PackedLinear)
    assert torch.equal(small.kept.float(), buffer.float())


def test_buffers_that_no_file_holds_are_named(tmp_path):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = _sparse_(nn.Linear(64, 64), (1, 1))
            self.register_buffer("positions", torch.arange(64.0), persistent=False)

    save_packed(packed(Positions()), tmp_path / "model.packed")
    with torch.device("meta"):
        fresh = nn.Module()
        fresh.layer = nn.Linear(64, 64)
        fresh.register_buffer("positions", torch.empty(64), persistent=False)
    with pytest.raises(ValueError, match="does not hold positions, which the model has on the meta device"):
        load_packed(tmp_path / "model.packed", fresh)
