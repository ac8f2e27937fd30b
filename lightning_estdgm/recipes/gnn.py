"""GCN, GAT and GraphSAGE over a whole graph, by PyTorch Geometric."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor

from lightning_estdgm._checks import expect_fraction, expect_int, expect_positive


class GraphNet(LightningModule):
    """PyG's GCN, GAT or GraphSAGE, trained on all nodes of one graph at once by Adam at a constant rate.

    A batch is a PyG ``Data`` with ``x`` [nodes, features], ``edge_index`` [2, edges], ``y`` [nodes] and the boolean
    ``train_mask``, ``val_mask`` and ``test_mask`` [nodes]. Output: logits [nodes, classes].
    Weight decay does not reach the last layer, but with a GAT. Source: Kipf and Welling 2017, arXiv 1609.02907;
    Velickovic et al. 2018, arXiv 1710.10903; Hamilton et al. 2017, arXiv 1706.02216.

    Args:
        features: Number of features of a node.
        classes: Number of classes.
        kind: Kind of the convolutions: gcn, gat or sage.
        hidden: Width of the hidden layers; with a GAT, of all heads together.
        layers: Number of convolutions.
        dropout: Dropout of hidden units, and of the features for a gcn and a gat; of a gat's attention too.
        norm: Whether batch normalisation follows each hidden layer.
        lr: Learning rate.
        weight_decay: Weight decay of all but the last layer.
        heads: Attention heads of a GAT's hidden layers; its last layer has one.

    Raises:
        ValueError: A size or rate is not positive, the kind is unknown, or the heads do not divide the width.

    """

    def __init__(
        self,
        features: int,
        classes: int,
        kind: Literal["gcn", "gat", "sage"] = "gcn",
        hidden: int = 16,
        layers: int = 2,
        dropout: float = 0.5,
        norm: bool = False,
        lr: float = 0.01,
        weight_decay: float = 5e-4,
        heads: int = 8,
    ) -> None:
        super().__init__()
        from torch_geometric.nn import GAT, GCN, GraphSAGE

        sizes = {"features": features, "classes": classes, "hidden": hidden, "layers": layers, "heads": heads}
        for name, value in sizes.items():
            expect_int(name, value, at_least=1)
        expect_fraction("dropout", dropout)
        expect_positive("lr", lr)
        makers = {"gcn": GCN, "gat": GAT, "sage": GraphSAGE}
        if kind not in makers:
            raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(makers)}")
        if kind == "gat" and hidden % heads:
            raise ValueError(f"hidden: got {hidden}, expected a multiple of heads, which is {heads}")
        self.save_hyperparameters()
        self.lr, self.weight_decay, self.decays_last = lr, weight_decay, kind == "gat"
        self.input_dropout = 0.0 if kind == "sage" else dropout
        more = {"heads": heads, "act": "elu"} if kind == "gat" else {}
        norm_layer = "batch_norm" if norm else None
        self.model = makers[kind](features, hidden, layers, classes, dropout=dropout, norm=norm_layer, **more)
        if kind == "gat":  # PyG gives the last layer as many heads as the others, and their mean
            from torch_geometric.nn import GATConv

            inputs = hidden if layers > 1 else features
            self.model.convs[-1] = GATConv(inputs, classes, heads=1, dropout=dropout)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Logits of each node's classes."""
        return self.model(drop_features(x, self.input_dropout) if self.training else x, edge_index)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step's loss: cross entropy over the nodes for training."""
        loss = F.cross_entropy(self(batch.x, batch.edge_index)[batch.train_mask], batch.y[batch.train_mask])
        self.log("train/loss", loss, batch_size=1)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log ``val/loss`` and ``val/accuracy``, a fraction, over the nodes for validation."""
        logits, y = self(batch.x, batch.edge_index)[batch.val_mask], batch.y[batch.val_mask]
        found = {"val/loss": F.cross_entropy(logits, y), "val/accuracy": (logits.argmax(1) == y).float().mean()}
        self.log_dict(found, batch_size=1, sync_dist=True, prog_bar=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log ``test/accuracy``, a fraction, over the nodes for testing."""
        logits, y = self(batch.x, batch.edge_index)[batch.test_mask], batch.y[batch.test_mask]
        self.log("test/accuracy", (logits.argmax(1) == y).float().mean(), batch_size=1, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Adam, with decay on all but the last layer, or on all with a GAT."""
        last = set() if self.decays_last else set(self.model.convs[-1].parameters())
        groups = [
            {"params": [p for p in self.parameters() if p not in last], "weight_decay": self.weight_decay},
            {"params": [p for p in self.parameters() if p in last], "weight_decay": 0.0},
        ]
        return torch.optim.Adam([group for group in groups if group["params"]], lr=self.lr)


def drop_features(x: Tensor, p: float) -> Tensor:
    """Dropout that draws for what is not 0 only: of bags of words, which are nearly all 0, most of a step's time.

    The distribution is that of ``torch.nn.functional.dropout``.

    Args:
        x: Features, of any shape.
        p: Probability of an element to become 0; others are divided by 1 - p.

    """
    if not p:
        return x
    flat = x.flatten()
    there = flat.detach().nonzero().squeeze(1)
    if 2 * len(there) > len(flat):
        return F.dropout(x, p)
    return flat.index_copy(0, there, F.dropout(flat[there], p)).view_as(x)
