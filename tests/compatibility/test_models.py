"""Models that people bring: each trains with the callback, keeps the invariants, and masks what it should."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from torch import nn
from torch.nn.utils import parametrizations

from helpers import compatibility_models as models
from helpers.compatibility import check
from helpers.compatibility_document import cells

HEAD, SHARED, PARAMETRIZED = "output head", "shared with another module", "not a plain parameter"


@dataclass(frozen=True)
class Model:
    """One row of the table of models.

    Attributes:
        name: title of the row.
        make: makes the module.
        dense: part of the reason, by a glob over the names of layers that must stay dense; all others must be masked.
            ``""`` takes any reason.
        either: globs over layers that versions of the library use differently: masked in one, dense in another.
        needs: library that the model comes from.
        settings: further arguments of `check`.

    """

    name: str
    make: Callable[[], Any]
    dense: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    needs: str = "torch"
    either: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


MODELS = (
    Model("Hugging Face GPT-2", models.gpt2, {"model.lm_head": SHARED}, "transformers"),
    Model("Hugging Face BERT", models.bert, {"*.decoder": SHARED}, "transformers"),
    Model("Hugging Face ViT", models.vit, {"model.classifier": HEAD}, "transformers"),
    Model("Hugging Face Llama", models.llama, {"model.lm_head": HEAD}, "transformers"),
    Model("Hugging Face T5", models.t5, {"model.lm_head": SHARED}, "transformers"),
    Model("Hugging Face Mamba2", models.mamba2, {"model.lm_head": ""}, "transformers", either=["*.mixer.conv1d"]),
    Model("Hugging Face Whisper", models.whisper, {"model.proj_out": SHARED}, "transformers"),
    Model("Hugging Face Mixtral", models.mixtral, {"model.lm_head": HEAD}, "transformers"),
    Model(
        "Hugging Face Qwen3-MoE",
        models.mixture("Qwen3Moe", moe_intermediate_size=128),
        {"model.lm_head": HEAD},
        "transformers",
    ),
    Model("Hugging Face GPT-OSS", models.mixture("GptOss"), {"model.lm_head": HEAD}, "transformers"),
    Model(
        "Hugging Face DeepSeek-V3",
        models.mixture("DeepseekV3", moe_intermediate_size=128),
        {"model.lm_head": HEAD},
        "transformers",
    ),
    Model("timm ViT", models.timm_model("test_vit", img_size=32), {"model.head": HEAD}, "timm"),
    Model("timm ConvNeXt", models.timm_model("test_convnext"), {"model.head.fc": HEAD}, "timm"),
    Model("timm EfficientNet", models.timm_model("test_efficientnet"), {"model.classifier": HEAD}, "timm"),
    Model("timm BiT", models.bit, {"model.0.*": "", "model.1.2": HEAD}, "timm"),
    Model(
        "timm NFNet",
        models.timm_model("test_nfnet"),
        {
            "model.stem.*": "",
            "model.stages.*.conv?*": "",
            "model.stages.*.downsample.*": "",
            "model.final_conv": "",
            "model.head.fc": HEAD,
        },
        "timm",
    ),
    Model("PyG GAT", models.gat, {"model.head": HEAD}, "torch_geometric"),
    Model("PyG GIN", models.gin, {"model.head": HEAD}, "torch_geometric"),
    Model("PyG GraphSAGE", models.sage, {"model.head": HEAD}, "torch_geometric"),
    Model(
        "PyG GraphSAGE, hetero",
        models.hetero,
        {"model.head.*": "", "model.second.paper__by__author.*": "no gradient"},
        "torch_geometric",
    ),
    Model("LSTM", models.lstm, {"model.head": HEAD}),
    Model(  # each network's last layer: while the generator steps, the discriminator behind it is frozen
        "GAN, manual optimization",
        models.Adversaries,
        {"discriminator.2": HEAD, "generator.2": "frozen in its step"},
        settings={"steps_per_batch": 2},
    ),
    Model("diffusion U-Net with attention", models.ddpm, {"model.leave": HEAD}),
    Model(
        "BYOL, frozen target",
        lambda: models.Byol(held=False),
        {"model.target.*": "no gradient", "model.predictor": HEAD},
    ),
    Model(
        "BYOL, target held by the optimizer",
        lambda: models.Byol(held=True),
        {"model.target.*": "", "model.predictor": HEAD},
    ),
    Model("LoRA by hand", models.lora, {"*.base": "no gradient", "model.4": HEAD}),
    Model(
        "spectral_norm",
        models.normed_convolutions(parametrizations.spectral_norm),
        {"model.0": PARAMETRIZED, "model.6": HEAD},
    ),
    Model(
        "weight_norm",
        models.normed_convolutions(parametrizations.weight_norm),
        {"model.0": PARAMETRIZED, "model.6": HEAD},
    ),
    Model(
        "spectral_norm, by a hook",
        models.normed_convolutions(nn.utils.spectral_norm),
        {"model.0": PARAMETRIZED, "model.6": HEAD},
        settings={"copies": False},
    ),
    Model("experts as modules", models.experts, {"model.head": HEAD}),
    Model("experts by einsum, adapted", models.own_experts("einsum"), settings={"config": models.adapted("einsum")}),
    Model("experts by bmm, adapted", models.own_experts("bmm"), settings={"config": models.adapted("bmm")}),
    Model("DLRM", models.dlrm, {"model.top.2": HEAD}),
    Model("F.linear on a layer's weight", models.used_by_hand, {"model.used": "", "model.head": HEAD}),
    Model("torch.compile", models.compiled, {"model.4": HEAD}),
)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_model(model: Model, tmp_path: Path, record: Callable[[str, str, Sequence[str]], None]) -> None:
    pytest.importorskip(model.needs)
    outcome = check(model.make, tmp_path, **model.settings)
    for glob in model.dense:
        assert any(fnmatchcase(name, glob) for name in outcome.dense), f"{glob} is masked, or no layer"
    for name, why in outcome.dense.items():
        if any(fnmatchcase(name, glob) for glob in model.either):
            continue
        reasons = [reason for glob, reason in model.dense.items() if fnmatchcase(name, glob)]
        assert reasons, f"{name} stays dense: {why}"
        assert any(reason in why for reason in reasons), f"{name}: {why}"
    masked = [name for name in outcome.layers if any(fnmatchcase(name, glob) for glob in model.dense)]
    assert not masked, f"{masked} are masked"
    record("models", model.name, cells(outcome))
