"""Small mixtures of experts: models of transformers with random weights, and plain modules."""

import torch
from torch import nn
from torch.nn import functional as F

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
HUGGING_FACE = {
    "Mixtral": {"intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 2},
    "Qwen3Moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 48,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 8,
    },
    "GptOss": {
        "intermediate_size": 48,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "layer_types": ["full_attention", "full_attention"],
    },
    "DeepseekV3": {
        "intermediate_size": 48,
        "moe_intermediate_size": 48,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 0,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "Olmoe": {"intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2},
}
"""Settings of small models, by the start of their classes' names."""

PARTS = {"gate_up_proj": 16, "down_proj": 8}
"""Parts of the experts' weights where gate and up lie one after the other."""


def hugging_face(name, **more):
    """Return a causal language model with random weights, the same ones at every call."""
    import transformers

    torch.manual_seed(0)
    settings = SIZES | HUGGING_FACE[name] | more
    if "layer_types" in settings:
        settings["layer_types"] = settings["layer_types"][: settings["num_hidden_layers"]]
    config = getattr(transformers, f"{name}Config")(**settings)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def tokens(step):
    return torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(step))


class EinsumExperts(nn.Module):
    """Every expert on every token, ``(experts, in, out)``, weighted by a softmax; nothing tells their number."""

    def __init__(self, experts=4, width=16, hidden=32):
        super().__init__()
        self.router = nn.Parameter(torch.randn(experts, width) / 4)
        self.w1 = nn.Parameter(torch.randn(experts, width, hidden) / 4)
        self.w2 = nn.Parameter(torch.randn(experts, hidden, width) / 4)

    def forward(self, x):
        y = torch.einsum("eth,ehd->etd", torch.einsum("td,edh->eth", x, self.w1).relu(), self.w2)
        return torch.einsum("te,etd->td", F.linear(x, self.router).softmax(-1), y)


class BmmExperts(nn.Module):
    """As many tokens for every expert, ``(experts, tokens, width)``; biases have three dimensions too."""

    def __init__(self, experts=4, width=16, hidden=32):
        super().__init__()
        self.num_experts = experts
        self.w1 = nn.Parameter(torch.randn(experts, width, hidden) / 4)
        self.b1 = nn.Parameter(torch.zeros(experts, 1, hidden))
        self.w2 = nn.Parameter(torch.randn(experts, hidden, width) / 4)

    def forward(self, x):
        split = x.view(self.num_experts, -1, x.shape[-1])
        return torch.bmm((torch.bmm(split, self.w1) + self.b1).relu(), self.w2)


def einsum_forward(module, product, x):
    """The forward of `EinsumExperts`, by the products that an adapter is given."""
    y = product("w2", product("w1", x.expand(len(module.w1), -1, -1)).relu())
    return torch.einsum("te,etd->td", F.linear(x, module.router).softmax(-1), y)


def bmm_forward(module, product, x):
    """The forward of `BmmExperts`, by the products that an adapter is given."""
    split = x.view(module.num_experts, -1, x.shape[-1])
    return product("w2", (product("w1", split) + module.b1).relu())


class SortedExperts(nn.Module):
    """One expert for each token, as many as it happens, ``(experts, out, in)``; a batch norm and dropout beside."""

    def __init__(self, experts=4, width=16, hidden=32):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.router = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, hidden, width) / 4)
        self.down = nn.Parameter(torch.randn(experts, width, hidden) / 4)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        scores, chosen = self.router(self.norm(x)).softmax(-1).max(-1)
        y = torch.empty_like(x)
        for expert, (up, down) in enumerate(zip(self.up.unbind(0), self.down.unbind(0), strict=True)):
            mine = chosen == expert
            y[mine] = F.linear(F.linear(x[mine], up).relu(), down)
        return self.dropout(y) * scores.unsqueeze(-1)


def sorted_forward(module, product, x):
    """The forward of `SortedExperts`, by the products that an adapter is given."""
    scores, chosen = module.router(module.norm(x)).softmax(-1).max(-1)
    chosen, order = chosen.sort()
    counts = torch.bincount(chosen, minlength=len(module.up))
    y = product("down", product("up", x[order], counts).relu(), counts)
    return module.dropout(torch.empty_like(y).index_copy(0, order, y)) * scores.unsqueeze(-1)


ADAPTERS = {
    "einsum": (EinsumExperts, {"w1": "eio", "w2": "eio"}, einsum_forward),
    "bmm": (BmmExperts, {"w1": "eio", "w2": "eio"}, bmm_forward),
    "sorted": (SortedExperts, {"up": "eoi", "down": "eoi"}, sorted_forward),
}
"""Class, layouts and forward of adapters for the plain modules, by what they compute with."""


def adapter(name, **change):
    """Return one of `ADAPTERS`, with some fields changed."""
    from lightning_estdgm import ExpertAdapter

    return ExpertAdapter(**dict(zip(("module", "layouts", "forward"), ADAPTERS[name], strict=True)) | change)
