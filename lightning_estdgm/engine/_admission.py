"""`Admission`: weights that wait to be masked until the first steps have shown that they train, and the verdicts.

A weight that could be masked is dense and unscaled until it has got a gradient that is not zero, an optimizer whose
hooks run has stepped it, and the audit of the forwards (`modules._audit`) has found nothing against it. What fails
stays dense, with a reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import distributed as dist
from torch import nn

from lightning_estdgm._words import first_names
from lightning_estdgm.engine._late_layers import SHARDED, LateLayers
from lightning_estdgm.engine._masked_weight import MaskedWeight
from lightning_estdgm.modules._audit import ForwardAudit
from lightning_estdgm.modules._candidates import Candidate

AUDITED_STEPS = 20
"""Number of steps after which a weight that no gradient has reached stays dense until it begins to train."""

_UNSEEN_STEPS = 5  # in a row, before it is said
_UNSEEN_STEPS_LATER = 50  # more than micro-batches that a loop accumulates while it writes to weights by itself
_OUTPUT = "output head: its output goes into no other layer"
_LAST_TRAINED = "last layer that trains: its output goes only into layers frozen in its step (include= masks it)"
HEADS = (_OUTPUT, _LAST_TRAINED)
"""Reasons why a layer stays dense that nobody asked for by ``include=``."""
_BY_ITSELF = "its weight is used by itself: its forward was not called"
_NOT_CALLED = (
    "no forward of it was seen in the step that trained it, as where a copy of the model computes: call the layer "
    "itself, or mask without looking (DGMController(audit=False)); where torch.compile has made the loss, call "
    "DGMController.probe_uncompiled() before the first step"
)
_WAITS = "no gradient has reached it yet: dense until then"


class _Seen(NamedTuple):
    """What any rank saw of a waiting weight: whether it trained, and fields of its `ForwardRecord`, as numbers."""

    trained: int
    called: int
    changed: int
    is_multiplied: int
    used_by_itself: int
    feeds: int
    feeds_frozen: int
    recorded: int
    order: int


@dataclass(frozen=True)
class _Graph:
    """What any rank saw of the graph of the forward: `ForwardAudit.saw_graph` and `ForwardAudit.has_end`."""

    was_seen: bool
    has_end: bool


class Admission:
    """Weights that wait to be masked, and the reasons of those that stay dense.

    Args:
        model: the model.
        candidates: its linear and convolution layers.
        waiting: weights that wait.
        group: process group of the ranks that train this model together; ``None``: no other rank is asked.

    Attributes:
        waiting: weights that wait.
        reasons: reasons why layers stay dense, by the layers' names.
        late: layers that have not trained so far.
        reopened: names of layers that were late, wait and are audited, or were taken in.

    """

    def __init__(
        self,
        model: nn.Module,
        candidates: Sequence[Candidate],
        waiting: Sequence[MaskedWeight],
        group: dist.ProcessGroup | None,
    ) -> None:
        self.waiting = list(waiting)
        self.late = LateLayers(candidates, group)
        self.reasons = dict.fromkeys(self.late.sharded, SHARDED)
        self.reopened: set[str] = set()
        self._model = model
        self._group = group
        self._saw_gradient: set[MaskedWeight] = set()
        self._stepped: set[MaskedWeight] = set()
        self._versions: dict[MaskedWeight, int] = {}  # torch's count of writes, at the last batch without a step
        self._unseen_steps = 0
        self._audit = ForwardAudit(model, candidates if waiting else ())

    def why_dense(self) -> dict[str, str]:
        """Return the reason of each layer that is not masked, by name, for those that were or are being audited."""
        return self.reasons | {w.name: "; ".join(filter(None, (_WAITS, w.note))) for w in self.waiting}

    def close(self) -> None:
        """Remove the hooks on the forwards. May be called twice."""
        self._audit.close()

    def keep_waiting(self, names: Collection[str], reasons: Mapping[str, str]) -> list[MaskedWeight]:
        """Take over an earlier verdict: return the weights of `names`, leave those with reasons dense, keep the rest.

        Args:
            names: names of layers that are masked.
            reasons: reasons why layers stay dense, by name.

        """
        taken = [weight for weight in self.waiting if weight.name in names]
        self.reasons = dict(reasons)
        self._end({weight.name for weight in taken} | reasons.keys())
        return taken

    def state_dict(self, candidates: Sequence[Candidate]) -> dict[str, Any]:
        """Return who waits, who stays dense and why, and who may come in late, in plain types.

        Args:
            candidates: linear and convolution layers of the model, as they are now.

        """
        asleep = {c.name: c.why for c in candidates if not c.masked and c.name in self.late.asleep}
        return {
            "waiting_layers": [weight.name for weight in self.waiting],
            "dense_layers": asleep | self.reasons,
            "late_layers": self.late.state_dict(),
            "reopened_layers": sorted(self.reopened),
        }

    def load_state_dict(self, state: Mapping[str, Any], candidates: Sequence[Candidate]) -> None:
        """Load who may come in late, and begin the audit of those who wait for one; `keep_waiting` does the rest.

        Args:
            state: mapping with the entries of `state_dict`, and maybe others.
            candidates: linear and convolution layers of the model, as they are now.

        """
        if "late_layers" in state:
            self.late.load_state_dict(state["late_layers"], candidates)
        self.reopened = set(state.get("reopened_layers", ()))
        self._saw_gradient.clear()
        self._stepped.clear()
        if self.waiting:
            self._audit_again(candidates)

    def _audit_again(self, candidates: Sequence[Candidate]) -> None:
        self._audit.close()
        self._audit = ForwardAudit(self._model, candidates)
        order = {candidate.name: i for i, candidate in enumerate(candidates)}
        self.waiting.sort(key=lambda weight: order[weight.name])  # the model's, on which masks depend

    # ------------------------------------------------------------------ what the first steps show

    def note_gradients(self, weights: Sequence[MaskedWeight]) -> None:
        """Note the waiting weights, and the late layers, that have got a gradient that is not zero."""
        self.late.note()
        if not self.waiting:
            return
        for weight in self._unseen(weights, self._saw_gradient):
            gradient = weight.gradient
            if gradient is not None and bool(torch.count_nonzero(gradient)):
                self._saw_gradient.add(weight)

    def reopen(self, weights: Sequence[MaskedWeight], candidates: Sequence[Candidate]) -> None:
        """Have weights that begin to train wait for an audit of the next step.

        Args:
            weights: weights of layers that took no gradient before.
            candidates: linear and convolution layers of the model, as they are now.

        """
        self.waiting += weights
        self.reopened |= {weight.name for weight in weights}
        self._audit_again(candidates)
        for weight in weights:
            self.reasons.pop(weight.name, None)

    @property
    def reopening(self) -> bool:
        """Whether the current step is audited for layers that have begun to train in mid-run."""
        return any(weight.name in self.reopened for weight in self.waiting)

    def used_by_themselves(self) -> dict[str, int]:
        """Return the positions that weights were applied to in this step without their layers' forwards, by name."""
        return self._audit.used_by_themselves()

    def note_begun_step(self, weights: Sequence[MaskedWeight]) -> None:
        """Note what the waiting weights hold that an optimizer is about to step."""
        self._audit.note_begun_step(weight.name for weight in self._unseen(weights, self._stepped))

    def note_step(self, weights: Sequence[MaskedWeight]) -> None:
        """Note the waiting weights that an optimizer has stepped."""
        self._versions.clear()  # what was written since may be this step's
        self._stepped.update(self._unseen(weights, self._stepped))

    def _unseen(self, weights: Sequence[MaskedWeight], seen: set[MaskedWeight]) -> list[MaskedWeight]:
        waiting = set(self.waiting)
        return [weight for weight in weights if weight in waiting and weight not in seen]

    def warn_if_steps_are_not_seen(self, masked: Sequence[MaskedWeight]) -> None:
        """Warn once if weights that train go on changing and no step of an optimizer was seen.

        Args:
            masked: weights that are masked already.

        """
        train = [*masked, *(weight for weight in self.waiting if weight in self._saw_gradient)]
        changed = {weight: weight.parameter._version for weight in train}
        moved = sum(self._versions.get(weight, version) != version for weight, version in changed.items())
        self._versions = changed
        self._unseen_steps = self._unseen_steps + 1 if moved else 0
        if self._unseen_steps == (_UNSEEN_STEPS_LATER if masked else _UNSEEN_STEPS):
            names = [weight.name for weight in changed]
            what = "Masks stay as they are" if masked else "Nothing is masked"
            warnings.warn(
                f"the weights of {len(names)} layers ({first_names(names)}) change between the batches, but none of "
                "their optimizer's steps was seen: its class does not run the step hooks of torch.optim.Optimizer. "
                f"{what}, and the schedule stands still. Have the class's step be "
                "called by `step()`, or keep the optimizer that steps as an attribute",
                RuntimeWarning,
                stacklevel=4,
            )

    # ------------------------------------------------------------------ verdicts

    def settle(self, steps: int, *, none_masked: bool) -> list[MaskedWeight]:
        """Decide after a step; return the weights to be masked from now on.

        If there is a group, its ranks have to call it together, and come to the same verdicts.

        Args:
            steps: number of steps done.
            none_masked: whether no weight is masked yet, so that what is seen now is all that there is.

        """
        seen, graph = self._seen_by_any_rank()
        trained = [weight for weight in self.waiting if seen[weight].trained]
        passed = []
        for weight in trained:
            its = seen[weight]
            if not its.called:
                self.reasons[weight.name] = _BY_ITSELF if its.used_by_itself else _NOT_CALLED
            elif its.changed or not (its.is_multiplied or weight.candidate.kind.is_adapted):  # adapters are compared
                self.reasons[weight.name] = self._why_changed(weight, bool(its.changed))
            else:
                passed.append(weight)
        heads = self._heads(passed, seen, graph, none_masked=none_masked)
        for weight in heads:
            self.reasons[weight.name] = _LAST_TRAINED if seen[weight].feeds_frozen else _OUTPUT
        decided = {weight.name for weight in trained}
        if steps >= AUDITED_STEPS:
            given_up = [weight for weight in self.waiting if weight.name not in decided]
            for weight in given_up:
                when = f"when it was looked at, at step {steps}" if weight.name in self.reopened else ""
                self.reasons[weight.name] = f"no gradient reached it {when or f'in the first {steps} steps'}"
            self.late.add(weight.candidate for weight in given_up)
            self.reopened -= {weight.name for weight in given_up}
            decided |= {weight.name for weight in self.waiting}
        self._end(decided)
        if self.waiting:
            self._audit.end_step()
        return [weight for weight in passed if weight not in heads]

    def _heads(
        self,
        weights: Sequence[MaskedWeight],
        seen: Mapping[MaskedWeight, _Seen],
        graph: _Graph,
        *,
        none_masked: bool,
    ) -> list[MaskedWeight]:
        """Return the output heads: what feeds no other layer; where that is not known, what seems to be one."""
        asked_for = [w for w in weights if w.candidate.why != "included" and not w.candidate.kind.experts]
        if not graph.was_seen:
            return [weight for weight in asked_for if weight.candidate.seems_head]
        heads = [w for w in asked_for if not seen[w].feeds and (w.candidate.seems_head or seen[w].recorded)]
        if none_masked and len(heads) == len(weights) == len(self.waiting) > 1:
            return [max(heads, key=lambda weight: seen[weight].order)]
        if none_masked and not graph.has_end:  # outputs are fed back, and all layers follow each other
            return [weight for weight in asked_for if weight.candidate.seems_head]
        return heads

    def _why_changed(self, weight: MaskedWeight, changed: bool) -> str:
        by = self._audit.records[weight.name].changed_by or (
            "something that another rank saw" if changed else "no product with it was seen"
        )
        name = type(weight.candidate.module).__name__
        return (
            f"{name} does not compute with its weight as it is stored ({by}): masked places may not be zero; "
            "views, casts, selections and products with a mask of 0 and 1 keep them"
        )

    def _seen_by_any_rank(self) -> tuple[dict[MaskedWeight, _Seen], _Graph]:
        """Return what was seen of each waiting weight, and of the whole forward; the same on every rank."""
        graph = (self._audit.saw_graph, self._audit.has_end)
        rows: list[tuple[int, ...]] = [graph + (0,) * (len(_Seen._fields) - len(graph))]
        for weight in self.waiting:
            record = self._audit.records[weight.name]
            rows.append(
                _Seen(
                    trained=weight in self._saw_gradient and weight in self._stepped,
                    called=record.called,
                    changed=record.changed_by != "",
                    is_multiplied=record.is_multiplied,
                    used_by_itself=record.used_by_itself,
                    feeds=record.feeds,
                    feeds_frozen=record.feeds_frozen,
                    recorded=record.recorded,
                    order=record.order,
                )
            )
        table = torch.tensor(rows, dtype=torch.int64, device=self.waiting[0].device)
        if self._group is not None:
            dist.all_reduce(table, dist.ReduceOp.MAX, group=self._group)
        first, *rest = table.tolist()
        seen = dict(zip(self.waiting, map(_Seen._make, rest), strict=True))
        return seen, _Graph(was_seen=bool(first[0]), has_end=bool(first[1]))

    def _end(self, decided: Collection[str]) -> None:
        self.waiting = [weight for weight in self.waiting if weight.name not in decided]
        if not self.waiting:
            self.close()
