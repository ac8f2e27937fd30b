"""ResNet-50: the published net, weight by weight, and how it is trained."""

from unittest import mock

import pytest
import torch

from lightning_estdgm.recipes import _optimizers as optimizers
from lightning_estdgm.recipes.resnet import ImageClassifier, ResNet, resnet50


def test_resnet50_computes_what_hugging_faces_does():
    """Theirs written by others, with the stride in the 3x3 convolution as ours; weights copied block by block."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000)).eval()
    ours = resnet50().eval()
    assert sum(p.numel() for p in ours.parameters()) == 25_557_032
    pairs = [(ours.conv1, theirs.resnet.embedder.embedder.convolution)]
    pairs += [(ours.bn1, theirs.resnet.embedder.embedder.normalization), (ours.fc, theirs.classifier[1])]
    stages = (ours.layer1, ours.layer2, ours.layer3, ours.layer4)
    for stage, other in zip(stages, theirs.resnet.encoder.stages, strict=True):
        for block, layer in zip(stage, other.layers, strict=True):
            convolutions = (block.conv1, block.conv2, block.conv3)
            pairs += [(a, b.convolution) for a, b in zip(convolutions, layer.layer, strict=True)]
            pairs += [(a, b.normalization) for a, b in zip((block.bn1, block.bn2, block.bn3), layer.layer, strict=True)]
            if block.downsample is not None:
                pairs += [(block.downsample[0], layer.shortcut.convolution)]
                pairs += [(block.downsample[1], layer.shortcut.normalization)]
    copied = 0
    for mine, given in pairs:
        for p in given.parameters():
            torch.nn.init.normal_(p, std=0.05) if p.ndim > 1 else torch.nn.init.uniform_(p, 0.5, 1.5)
        mine.load_state_dict(given.state_dict())
        copied += sum(p.numel() for p in mine.parameters())
    assert copied == 25_557_032
    x = torch.randn(2, 3, 65, 65)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).logits)


def test_weights_have_torchvisions_names():
    with torch.device("meta"):
        names = set(resnet50().state_dict())
    assert len(names) == 320
    assert {"conv1.weight", "bn1.running_var", "layer1.0.downsample.0.weight", "layer4.2.bn3.bias", "fc.bias"} <= names
    assert "layer1.1.downsample.0.weight" not in names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": (1, 1, 1)}, r"layers: got \[1, 1, 1\], expected four positive numbers"),
        ({"layers": (1, 1, 1, 0)}, r"layers: got \[1, 1, 1, 0\], expected four positive numbers"),
        ({"num_classes": 0}, "num_classes: got 0, expected at least 1"),
        ({"width": 0}, "width: got 0, expected at least 1"),
    ],
)
def test_bad_shapes_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ResNet(**settings)


def test_training_is_channels_last_with_smoothed_labels_and_decay_on_matrices_only():
    torch.manual_seed(0)
    model = ImageClassifier(num_classes=5, layers=(1, 1, 1, 1), width=8, label_smoothing=0.2)
    seen = []
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            assert layer.weight.is_contiguous(memory_format=torch.channels_last)
            layer.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    x, y = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 4])
    steps = []
    model.log = lambda name, value, **_: steps.append((name, value))
    loss = model.training_step((x, y), 0)
    assert len(seen) == 17
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    logs = model(x).log_softmax(1)
    target = 0.8 * torch.nn.functional.one_hot(y, 5) + 0.2 / 5
    torch.testing.assert_close(loss, -(target * logs).sum(1).mean())
    assert steps == [("train/loss", loss)]
    with mock.patch.object(optimizers, "run_steps", return_value=100):
        made = model.configure_optimizers()
    decayed, plain = made["optimizer"].param_groups
    assert (decayed["weight_decay"], plain["weight_decay"], plain["momentum"]) == (1e-4, 0.0, 0.9)
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert {p.ndim for p in plain["params"]} == {1}
    rates = [0.1 * made["lr_scheduler"]["scheduler"].lr_lambdas[0](step) for step in (0, 4, 100)]
    assert rates == pytest.approx([0.02, 0.1, 0.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr: got 0.0, expected a positive number"),
        ({"momentum": 1.0}, r"momentum: got 1.0, expected a fraction in \[0, 1\)"),
        ({"label_smoothing": -0.1}, r"label_smoothing: got -0.1, expected a fraction"),
    ],
)
def test_bad_settings_of_the_training_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageClassifier(**settings)
