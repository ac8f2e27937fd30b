"""GCN and GraphSAGE over a whole graph, by PyTorch Geometric."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor

from lightning_estdgm._checks import expect_fraction, expect_int, expect_positive


class GraphNet(LightningModule):
    """PyG's GCN or GraphSAGE, trained on all nodes of one graph at once by Adam at a constant rate.

    A batch is a PyG ``Data`` with ``x`` [nodes, features], ``edge_index`` [2, edges], ``y`` [nodes] and the boolean
    ``train_mask`` and ``val_mask`` [nodes]. Output: logits [nodes, classes].
    Weight decay does not reach the last layer. Source: Kipf and Welling 2017, arXiv 1609.02907; Hamilton et al. 2017,
    arXiv 1706.02216.

    Args:
        features: Number of features of a node.
        classes: Number of classes.
        kind: Kind of the convolutions: gcn or sage.
        hidden: Width of the hidden layers.
        layers: Number of convolutions.
        dropout: Dropout of hidden units, and of the features for a gcn.
        norm: Whether batch normalisation follows each hidden layer.
        lr: Learning rate.
        weight_decay: Weight decay of all but the last layer.

    Raises:
        ValueError: A size or rate is not positive, or the kind is unknown.

    """

    def __init__(
        self,
        features: int,
        classes: int,
        kind: Literal["gcn", "sage"] = "gcn",
        hidden: int = 16,
        layers: int = 2,
        dropout: float = 0.5,
        norm: bool = False,
        lr: float = 0.01,
        weight_decay: float = 5e-4,
    ) -> None:
        super().__init__()
        from torch_geometric.nn import GCN, GraphSAGE

        sizes = {"features": features, "classes": classes, "hidden": hidden, "layers": layers}
        for name, value in sizes.items():
            expect_int(name, value, at_least=1)
        expect_fraction("dropout", dropout)
        expect_positive("lr", lr)
        if kind not in ("gcn", "sage"):
            raise ValueError(f"kind: got {kind!r}, expected gcn or sage")
        self.save_hyperparameters()
        self.lr, self.weight_decay = lr, weight_decay
        self.input_dropout = dropout if kind == "gcn" else 0.0
        make = GCN if kind == "gcn" else GraphSAGE
        self.model = make(features, hidden, layers, classes, dropout=dropout, norm="batch_norm" if norm else None)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Logits of each node's classes."""
        return self.model(F.dropout(x, self.input_dropout, self.training), edge_index)

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

    def configure_optimizers(self) -> Any:
        """Adam, with decay on all but the last layer."""
        last = set(self.model.convs[-1].parameters())
        groups = [
            {"params": [p for p in self.parameters() if p not in last], "weight_decay": self.weight_decay},
            {"params": [p for p in self.parameters() if p in last], "weight_decay": 0.0},
        ]
        return torch.optim.Adam([group for group in groups if group["params"]], lr=self.lr)
