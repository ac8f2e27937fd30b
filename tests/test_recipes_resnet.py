"""ResNet-50: the published net, weight by weight."""

import pytest
import torch

from lightning_estdgm.recipes.resnet import ResNet, resnet50


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
