"""Small models of the kinds that people train, each as a LightningModule with data of its own; no download.

Libraries are imported when a model of theirs is made.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.compatibility import SCHEDULE
from helpers.expert_models import ADAPTERS, adapter, hugging_face
from helpers.models import GAN, Batches
from lightning_estdgm import DGMConfig, Selection


class Sample(pl.LightningModule):
    """`model`, trained by AdamW on batches of ``batch_of(generator)`` with the loss ``loss_of(model, batch)``."""

    def __init__(
        self, model: nn.Module, batch_of: Callable[[torch.Generator], Any], loss_of: Callable[[Any, Any], Tensor]
    ) -> None:
        super().__init__()
        self.model, self.batch_of, self.loss_of = model, batch_of, loss_of

    def batches(self, n: int) -> Batches:
        generator = torch.Generator().manual_seed(1)
        return Batches(self.batch_of(generator) for _ in range(n))

    def loss(self, batch: Any) -> Tensor:
        return self.loss_of(self.model, batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


# --------------------------------------------------------------------------- batches and losses


def _tokens(vocabulary: int = 64, shape: tuple[int, ...] = (2, 8)) -> Callable[[torch.Generator], Any]:
    return lambda generator: torch.randint(3, vocabulary, shape, generator=generator)


def _images(size: int = 32, channels: int = 3, classes: int = 4) -> Callable[[torch.Generator], Any]:
    return lambda generator: (
        torch.randn(4, channels, size, size, generator=generator),
        torch.randint(classes, (4,), generator=generator),
    )


def _rows(width: int) -> Callable[[torch.Generator], Any]:
    return lambda generator: (torch.randn(8, width, generator=generator), torch.randint(4, (8,), generator=generator))


def _classified(model: Any, batch: Any) -> Tensor:
    *inputs, labels = batch
    return F.cross_entropy(model(*inputs), labels)


def _language(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


# --------------------------------------------------------------------------- Hugging Face


def _small(**settings: Any) -> dict[str, Any]:
    """Return settings of a transformer of one layer, wide enough for blocks of 16."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    return {"vocab_size": 64, "max_position_embeddings": 16, **sizes, **settings}


def gpt2() -> Sample:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_positions=8, n_embd=128, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    return Sample(GPT2LMHeadModel(config), _tokens(), _language)


def bert() -> Sample:
    from transformers import BertConfig, BertForMaskedLM

    return Sample(BertForMaskedLM(BertConfig(**_small())), _tokens(), _language)


def vit() -> Sample:
    from transformers import ViTConfig, ViTForImageClassification

    settings = {k: v for k, v in _small().items() if k not in ("vocab_size", "max_position_embeddings")}
    model = ViTForImageClassification(ViTConfig(**settings, image_size=8, patch_size=4, num_labels=4))
    return Sample(model, _images(8), lambda m, b: F.cross_entropy(m(pixel_values=b[0]).logits, b[1]))


def llama() -> Sample:
    from transformers import LlamaConfig, LlamaForCausalLM

    return Sample(LlamaForCausalLM(LlamaConfig(**_small(num_key_value_heads=1))), _tokens(), _language)


def t5() -> Sample:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64, d_model=128, d_kv=64, d_ff=128, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return Sample(T5ForConditionalGeneration(config), _tokens(), _language)


def mamba2() -> Sample:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=64,
        hidden_size=128,
        expand=1,
        num_heads=4,
        head_dim=32,
        state_size=16,
        n_groups=1,
        num_hidden_layers=1,
        chunk_size=8,
    )
    return Sample(Mamba2ForCausalLM(config), _tokens(), _language)


def whisper() -> Sample:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=64,
        num_mel_bins=8,
        d_model=128,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=8,
        max_target_positions=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
        suppress_tokens=None,
    )

    def batch_of(generator: torch.Generator) -> Any:
        return torch.randn(2, 8, 16, generator=generator), torch.randint(3, 64, (2, 6), generator=generator)

    model = WhisperForConditionalGeneration(config)
    return Sample(model, batch_of, lambda m, b: m(input_features=b[0], labels=b[1]).loss)


def mixtral() -> Sample:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**_small(num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2))
    return Sample(MixtralForCausalLM(config), _tokens(), _language)


def mixture(name: str, **settings: int) -> Callable[[], Sample]:
    """Return a maker of one of transformers' mixtures of experts, which skips where that version has none."""

    def make() -> Sample:
        import transformers

        if not hasattr(transformers, f"{name}Config"):
            pytest.skip(f"transformers {transformers.__version__} has no {name}")
        return Sample(hugging_face(name, **_small(num_key_value_heads=2, **settings)), _tokens(), _language)

    return make


def own_experts(name: str) -> Callable[[], Sample]:
    """Return a maker of experts of one's own, see `expert_models.ADAPTERS`, between linear layers."""

    def loss_of(model: Any, x: Tensor) -> Tensor:
        return (model(x).reshape(x.shape) - x.sin()).square().mean()

    def make() -> Sample:
        experts = ADAPTERS[name][0](width=128, hidden=128)
        model = nn.Sequential(nn.Linear(128, 128), experts)
        return Sample(model, lambda generator: torch.randn(12, 128, generator=generator), loss_of)

    return make


def adapted(name: str) -> DGMConfig:
    """Return the settings of `compatibility.check`, with an adapter of `own_experts`."""
    return DGMConfig(SCHEDULE, selection=Selection(experts=[adapter(name)]), backend="cpu")


# --------------------------------------------------------------------------- timm


def timm_model(name: str, **settings: Any) -> Callable[[], Sample]:
    """Return a maker of one of timm's classifiers."""

    def make() -> Sample:
        import timm

        return Sample(timm.create_model(name, num_classes=4, **settings), _images(), _classified)

    return make


def bit() -> Sample:
    """Return timm's BiT with a neck: its own layers are all weight-standardised."""
    from timm.models.resnetv2 import ResNetV2

    body = ResNetV2([1, 1], channels=(128, 128), num_classes=0, stem_chs=32)
    neck = nn.Sequential(nn.Linear(body.num_features, 128), nn.ReLU(), nn.Linear(128, 4))
    return Sample(nn.Sequential(body, neck), _images(), _classified)


# --------------------------------------------------------------------------- graph nets


class _GraphNet(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module, width: int, classes: int = 4) -> None:
        super().__init__()
        self.first, self.second, self.head = first, second, nn.Linear(width, classes)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x, edges)), edges)))


def _graph(generator: torch.Generator) -> Any:
    return (
        torch.randn(10, 32, generator=generator),
        torch.randint(10, (2, 30), generator=generator),
        torch.randint(4, (10,), generator=generator),
    )


def gat() -> Sample:
    from torch_geometric.nn import GATConv

    return Sample(_GraphNet(GATConv(32, 16, heads=2), GATConv(32, 32), 32), _graph, _classified)


def gin() -> Sample:
    from torch_geometric.nn import GINConv

    def layers() -> nn.Sequential:
        return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))

    return Sample(_GraphNet(GINConv(layers()), GINConv(layers()), 32), _graph, _classified)


def sage() -> Sample:
    from torch_geometric.nn import SAGEConv

    return Sample(_GraphNet(SAGEConv(32, 32), SAGEConv(32, 32), 32), _graph, _classified)


def hetero() -> Sample:
    from torch_geometric.nn import SAGEConv, to_hetero

    class Net(_GraphNet):
        def forward(self, x, edges):  # without hints: torch.fx of torch 2.6 cannot name types that are strings
            return super().forward(x, edges)

    kinds = (["paper", "author"], [("author", "writes", "paper"), ("paper", "by", "author")])
    model = to_hetero(Net(SAGEConv((32, 32), 32), SAGEConv((32, 32), 32), 32), kinds, aggr="sum")

    def batch_of(generator: torch.Generator) -> Any:
        x = {node: torch.randn(10, 32, generator=generator) for node in kinds[0]}
        edges = {edge: torch.randint(10, (2, 30), generator=generator) for edge in kinds[1]}
        return x, edges, torch.randint(4, (10,), generator=generator)

    return Sample(model, batch_of, lambda m, b: F.cross_entropy(m(b[0], b[1])["paper"], b[2]))


# --------------------------------------------------------------------------- written by hand


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.project = nn.Linear(32, 128)
        self.lstm = nn.LSTM(128, 128, batch_first=True)
        self.head = nn.Linear(128, 64)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.project(self.embedding(ids)))[0])


def lstm() -> Sample:
    return Sample(_Recurrent(), _tokens(), lambda m, ids: F.cross_entropy(m(ids[:, :-1]).mT, ids[:, 1:]))


class Adversaries(GAN):
    """A generator and a discriminator in manual optimization."""

    def batches(self, n: int) -> Batches:
        generator = torch.Generator().manual_seed(1)
        return Batches((torch.randn(8, 16, generator=generator), 0) for _ in range(n))

    def loss(self, batch: Any) -> Tensor:
        return F.softplus(-self.discriminator(self.generator(batch[0]))).mean()


class _Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.to_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.flatten(2).mT for part in self.to_qkv(self.norm(x)).chunk(3, 1))
        return x + self.to_out(F.scaled_dot_product_attention(q, k, v).mT.unflatten(2, x.shape[2:]))


class _UNet(nn.Module):
    """Predicts the noise of an image: one level down and up, with time, skip connection and attention."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.attention = _Attention(2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge = nn.Conv2d(2 * width, width, 3, padding=1)
        self.leave = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.logspace(0, 2, 8)
        hidden = self.enter(x) + self.time(torch.cat([angles.sin(), angles.cos()], 1))[..., None, None]
        up = self.up(self.attention(F.silu(self.down(hidden))))
        return self.leave(F.silu(self.merge(torch.cat([hidden, up], 1))))


def ddpm() -> Sample:
    def batch_of(generator: torch.Generator) -> Any:
        clean, noise = (torch.randn(4, 3, 8, 8, generator=generator) for _ in range(2))
        return clean, noise, torch.rand(4, generator=generator)

    def loss_of(model: Any, batch: Any) -> Tensor:
        clean, noise, t = batch
        share = t[:, None, None, None]
        return F.mse_loss(model((1 - share).sqrt() * clean + share.sqrt() * noise, t), noise)

    return Sample(_UNet(), batch_of, loss_of)


class Byol(Sample):
    """An online network that predicts a target network, which follows it by a moving average."""

    def __init__(self, *, held: bool) -> None:
        online = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        model = nn.ModuleDict({"online": online, "predictor": nn.Linear(32, 32), "target": copy.deepcopy(online)})
        model["target"].requires_grad_(held)
        super().__init__(model, lambda generator: torch.randn(8, 32, generator=generator), self._difference)

    @staticmethod
    def _difference(model: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            goal = model["target"](x.flip(1))
        return 1 - F.cosine_similarity(model["predictor"](model["online"](x)), goal).mean()

    def on_train_batch_start(self, *args: Any) -> None:
        with torch.no_grad():
            pairs = zip(self.model["online"].parameters(), self.model["target"].parameters(), strict=True)
            for online, target in pairs:
                target.lerp_(online, 0.05)


class _Adapted(nn.Module):
    """A frozen linear layer with a trained one of rank 8 beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a = nn.Linear(base.in_features, 8, bias=False)
        self.lora_b = nn.Linear(8, base.out_features, bias=False)
        nn.init.normal_(self.lora_b.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_b(self.lora_a(x))


def lora() -> Sample:
    body = [_Adapted(nn.Linear(64, 64)), nn.ReLU(), _Adapted(nn.Linear(64, 64)), nn.ReLU()]
    return Sample(nn.Sequential(*body, nn.Linear(64, 4)), _rows(64), _classified)


def normed_convolutions(norm: Callable[[nn.Module], nn.Module]) -> Callable[[], Sample]:
    """Return a maker of a net with one convolution under `norm`, and one without."""

    def make() -> Sample:
        body = [norm(nn.Conv2d(3, 16, 3)), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
        return Sample(nn.Sequential(*body, nn.Flatten(), nn.Linear(16, 4)), _images(8), _classified)

    return make


class _Experts(nn.Module):
    """Four experts that are modules, of which each row takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(4))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(1)
        best, choice = shares.max(1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (choice == index).nonzero().squeeze(1)
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * best[rows, None])
        return self.head(x + out)


def experts() -> Sample:
    return Sample(_Experts(), _rows(32), _classified)


class _Recommender(nn.Module):
    """Embeddings of categories and a perceptron over numbers, whose products go into another, as in DLRM."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.EmbeddingBag(50, 16, mode="sum") for _ in range(3))
        self.bottom = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
        self.top = nn.Sequential(nn.Linear(22, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        dense = self.bottom(numbers)
        features = torch.stack([dense, *(e(c) for e, c in zip(self.embeddings, categories, strict=True))], 1)
        rows, columns = torch.triu_indices(4, 4, 1)
        products = (features @ features.mT)[:, rows, columns]
        return self.top(torch.cat([dense, products], 1)).squeeze(1)


def dlrm() -> Sample:
    def batch_of(generator: torch.Generator) -> Any:
        categories = torch.randint(50, (3, 8, 2), generator=generator)
        clicks = torch.randint(2, (8,), generator=generator).float()
        return torch.randn(8, 8, generator=generator), categories, clicks

    return Sample(_Recommender(), batch_of, lambda m, b: F.binary_cross_entropy_with_logits(m(b[0], b[1]), b[2]))


class _UsedByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.called, self.used, self.head = nn.Linear(128, 128), nn.Linear(128, 128), nn.Linear(128, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(F.linear(F.relu(self.called(x)), self.used.weight, self.used.bias)))


def used_by_hand() -> Sample:
    return Sample(_UsedByHand(), _rows(128), _classified)


def compiled() -> Sample:
    """A compiled net; the compiler's last stage is left out, for time."""
    net = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 4))
    return Sample(torch.compile(net, backend="aot_eager"), _rows(128), _classified)  # type: ignore[arg-type]
