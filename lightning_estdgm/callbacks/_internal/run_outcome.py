"""`RunOutcome`: comparison of a fit's end, and of its best checkpoints, with the density that was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_estdgm._words import first_names
from lightning_estdgm.engine._controller import DGMController

_TOLERANCE = 0.05  # relative: whole units meet a density only nearly
_BEFORE_ITS_END = (
    "Resume it to go on. Where a callback such as EarlyStopping ended it, have that wait for the final density "
    "(`dgm/density` is in trainer.callback_metrics), or give the length of the run as DGMCallback(total_steps=...)"
)
_TAKES_NO_MORE = (
    "layers are taken in at mask updates, and no more are to come; or several ranks train the model, where layers are "
    "taken in that are whole and equal on all of them. DGMCallback.decisions() has the reason of each. "
)
_PACKED_TAKES_NONE = (
    "storage='packed' has masks before the first step, and takes no layer in later; storage='dense' does. "
)
_UPDATE_WAITED = (
    "A mask update was due, and no step since had finite gradients to decide it by: look for what makes them NaN or "
    "infinite, lower the learning rate, or clip gradients (gradient_clip_val=)"
)
_AT_ITS_END = (
    "Either too few steps were left for the last mask update, or the pattern or the units do not come nearer in layers "
    "as small as these: leave those out by Selection(exclude=...), or take Units(size=1) and no pattern"
)


@dataclass(frozen=True)
class BestCheckpoint:
    """Best checkpoint of a `ModelCheckpoint`.

    Attributes:
        path: path of the file.
        monitor: name of the metric that chose it.
        density: active share of the masked weights when it was saved; None if not known.
        phase: phase of the schedule when it was saved; None if not known.

    """

    path: str
    monitor: str
    density: float | None
    phase: str | None


class RunOutcome:
    """Outcome of a fit: its final density, its best checkpoints, and layers that came too late to be masked.

    Args:
        trainer: Trainer of the fit.
        controller: controller of the fit.
        before: outcome of the fit before, if any: a best checkpoint may be of that one.

    Attributes:
        resumes: whether the fit goes on from a checkpoint, and no step of it was seen yet.

    """

    def __init__(self, trainer: pl.Trainer, controller: DGMController, before: RunOutcome | None = None) -> None:
        self._trainer = trainer
        self._controller = controller
        # With its score, a new object for each file: where all have one path, it alone tells them apart.
        self._best: dict[ModelCheckpoint, tuple[BestCheckpoint, Tensor | None]] = {}
        self._earlier: list[dict[str, Any]] = [] if before is None else before._entries()  # those of other fits
        self._watching = False
        self._thawed: list[str] = []
        self._replaced: list[str] = []
        self._exceeding: list[str] = []
        self.resumes = False

    def watch(self) -> None:
        """Note the density of new best checkpoints. Call it between any two steps; the first call is before any."""
        if self.resumes:
            self.resumes = False
            self._say_frozen()
        for callback in self._trainer.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint) or callback.monitor is None:
                continue
            path, score = callback.best_model_path, callback.best_model_score
            known = self._best.get(callback)
            if path and (known is None or known[0].path != path or known[1] is not score):
                self._best[callback] = self._best_now(path, callback.monitor, score), score
        self._watching = True

    def _best_now(self, path: str, monitor: str, score: Tensor | None) -> BestCheckpoint:
        if self._watching:
            return BestCheckpoint(path, monitor, self._controller.density, self._controller.phase)
        # Lightning restores no score where the folder has changed.
        entry = {"path": path, "monitor": monitor} | ({} if score is None else {"score": float(score)})
        known = next((e for e in self._earlier if e.items() >= entry.items()), {})
        return BestCheckpoint(path, monitor, known.get("density"), known.get("phase"))

    def state_dict(self) -> dict[str, Any]:
        """Return the best checkpoints in plain types, with the one that is being saved; empty if there are none."""
        if self._watching:
            self.watch()
        entries = self._entries()
        return {"best_checkpoints": entries} if entries else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the best checkpoints of the run that is resumed; states of earlier versions hold none.

        In mid-run, they are looked up anew: `ModelCheckpoint` restores its score as another object.
        """
        known = state.get("best_checkpoints", ())
        self._earlier = [*known, *(entry for entry in self._earlier if entry not in known)]
        self._best.clear()
        self._watching = False

    def _entries(self) -> list[dict[str, Any]]:
        now = [asdict(b) | {"score": None if score is None else float(score)} for b, score in self._best.values()]
        return now or self._earlier

    def _say_frozen(self) -> None:
        # BackboneFinetuning of lightning 2.6.6 freezes in `setup`, and thaws in one epoch: resumed later, never.
        masked = [weight.candidate for weight in self._controller.masked_weights]
        names = [candidate.name for candidate in masked if not candidate.weight.requires_grad]
        if names:
            rank_zero_warn(
                f"DGMCallback: {len(names)} layers ({first_names(names)}) trained when the checkpoint was saved and "
                "take no gradient now: they stay as they are unless something thaws them. A callback such as "
                "BackboneFinetuning freezes them again in a resumed run; for it to go on as before, thaw them in "
                "on_train_start"
            )

    def watch_thawed(self) -> None:
        """Warn of layers that have begun to train in mid-run and stay dense. Call it at the start of each epoch."""
        now = self._controller.late_layers()
        new = [name for name in now if name not in self._thawed]
        if new:
            self._thawed += new
            packed = self._controller.config.storage == "packed"
            rank_zero_warn(
                f"DGMCallback: {len(new)} layers ({first_names(new)}) have begun to train in mid-run and stay dense: "
                + (_PACKED_TAKES_NONE if packed else _TAKES_NO_MORE)
                + "To mask them, thaw them before the fit, or begin another fit"
            )

    def watch_replaced(self) -> None:
        """Warn of layers that were replaced or put in since the fit began, which nothing masks.

        Call it at the start of each epoch, after mask updates, and at the end of training.
        """
        new = [name for name in self._controller.note_unmasked_layers() if name not in self._replaced]
        if new:
            self._replaced += new
            rank_zero_warn(
                f"DGMCallback: {len(new)} layers ({first_names(new)}) were put in or replaced since the fit began, or "
                "their weight is another parameter or computed by a parametrization: these are not masked, and one "
                "that was replaced counts as dense from now on. To mask them, begin another fit; to give a layer other "
                "values, keep it and its parameter, and copy them into it (layer.weight.copy_, layer.reset_parameters)"
            )

    def watch_weights(self) -> None:
        """Warn of weights outside the masks, which something has put in after the last step. Call it at the end."""
        self._exceeding = names = [weight.name for weight in self._controller.masked_weights if weight.exceeds_mask()]
        if names:
            rank_zero_warn(
                f"DGMCallback: the fit ends with weights outside the masks in {len(names)} layers "
                f"({first_names(names)}): others were put in after the last step, as the best ones so far, saved at a "
                "higher density, or an average. They are left as they are, so the network is denser than `density` "
                "says, which is that of the last step. Keep the best of the final density alone, or mask an average: "
                "see docs/guides/resume.md"
            )

    def summary(self) -> dict[str, Any]:
        """Return the outcome in plain types: whether the final density was met, dense layers, the best checkpoints."""
        return {
            "ended_as_asked": self._masks_any
            and not (self._replaced or self._exceeding)
            and self._is_asked(self._controller.density),
            "thawed_and_dense": list(self._thawed),
            "replaced_and_dense": list(self._replaced),
            "best_checkpoints": [asdict(best) for best, _ in self._best.values()],
        }

    def say(self) -> None:
        """Warn if the run, or its best checkpoint, does not have the density that was asked for."""
        self.watch()
        self._watching = False
        self.watch_thawed()
        controller, trainer = self._controller, self._trainer
        asked = controller.final_density
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not self._masks_any:
            if trainer.global_step:  # the controller counts the steps of weights that it could mask alone
                rank_zero_warn(
                    "nothing was masked in this run, it trained dense: no step showed a layer that can be masked. "
                    "The reason of each is in DGMCallback.decisions()"
                )
        elif not self._is_asked(controller.density):
            length = controller.schedule.total_steps
            rank_zero_warn(
                f"the run ended at position {controller.position} of {length} of the schedule, in {controller.phase}, "
                f"at density {controller.density:.2f}; asked for was {asked:.2f} at the end. "
                + self._why_not_as_asked(controller.position >= length)
            )
        for best, _ in self._best.values():
            if best.density is None:
                rank_zero_warn(
                    f"the best checkpoint by {best.monitor!r}, {best.path}, was saved before this fit, and at what "
                    f"density is not known; asked for was {asked:.2f}. See docs/guides/checkpoints.md"
                )
            elif not self._is_asked(best.density):
                rank_zero_warn(
                    f"the best checkpoint by {best.monitor!r}, {best.path}, was saved in {best.phase}, at density "
                    f"{best.density:.2f}; asked for was {asked:.2f} at the end. To keep the best at the final "
                    "density, monitor a metric that is logged there only: see docs/guides/checkpoints.md"
                )

    def _why_not_as_asked(self, is_at_end: bool) -> str:
        if not is_at_end:
            return _BEFORE_ITS_END
        if self._replaced:
            return f"Replaced layers are dense: {first_names(self._replaced)}"
        return _UPDATE_WAITED if self._controller.update_waits else _AT_ITS_END

    @property
    def _masks_any(self) -> bool:
        return bool(self._controller.layer_densities())

    def _is_asked(self, density: float) -> bool:
        asked = self._controller.final_density
        return abs(density - asked) <= _TOLERANCE * asked
