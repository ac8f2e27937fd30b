"""`DGMCallback` with ``storage="packed"`` in a real Trainer: checkpoints, Lightning's features, refusals."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from helpers.models import MLP, NO_VALIDATION_LOADER, ConvNet, ResumableLoader, make_trainer
from helpers.runs import EPOCH_STEPS, SCHEDULE, STEPS
from helpers.storages import LoadsByItself
from lightning_estdgm import DGMCallback, DGMConfig, DGMController, EstDgm, Selection, Units
from lightning_estdgm.method._schedules import ConstantDensity
from lightning_estdgm.method._update_rule import UpdateRule
from lightning_estdgm.modules._packed_forward import PackedForward

pytestmark = [
    pytest.mark.filterwarnings(NO_VALIDATION_LOADER),
    pytest.mark.filterwarnings("ignore:Be aware .*add the following callbacks"),
]
ROUNDING = 1e-12


def config(storage="packed", unit=4, **settings):
    return DGMConfig(SCHEDULE, units=Units(size=unit), storage=storage, **settings)


class Double(MLP):
    """In float64, so that the two storages differ by rounding alone."""

    def __init__(self, optimizer="adamw", scheduler="onecycle"):
        super().__init__(32, optimizer, scheduler)
        self.double()

    def loss(self, batch):
        return super().loss(tuple(x.double() for x in batch))


def loader(accumulate=1, cls=MLP):
    return ResumableLoader(cls.batches(EPOCH_STEPS * accumulate, *([32] if cls is MLP else [])))


def fit(callback, *extra, module=None, ckpt=None, seed=0, accumulate=1, cls=Double, **settings):
    pl.seed_everything(seed, verbose=False)
    module = module or cls()
    trainer = make_trainer(
        callback,
        *extra,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in extra),
        **{"max_steps": STEPS, "max_epochs": -1, "accumulate_grad_batches": accumulate, **settings},
    )
    trainer.fit(module, loader(accumulate, MLP if issubclass(cls, MLP) else cls), ckpt_path=ckpt)
    return module, trainer


def state_of(trainer):
    """Return weights and optimizer state as a checkpoint has them."""
    checkpoint = trainer._checkpoint_connector.dump_checkpoint()
    states = [state for optimizer in checkpoint["optimizer_states"] for state in optimizer["state"].items()]
    return checkpoint["state_dict"], {f"{i}.{k}": torch.as_tensor(x) for i, s in sorted(states) for k, x in s.items()}


def difference(one, other):
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        worst = max([worst, *((a[k] - b[k]).abs().max().item() for k in a)])
    return worst


def dense_without_audit(accumulate=1, clip=None):
    """Return the state of a plain loop with dense storage, whose masks are there from the first step on."""
    pl.seed_everything(0, verbose=False)
    module = Double()
    trainer = make_trainer(max_steps=STEPS)
    module.trainer = trainer
    optimizer = torch.optim.AdamW(module.parameter_groups(), lr=1e-3)
    batches = loader(accumulate).batches
    with DGMController(module, optimizer, config("dense", backend="dense"), total_steps=STEPS, audit=False) as dgm:
        for step in range(STEPS):
            optimizer.zero_grad()
            for i in range(accumulate):
                batch = batches[(step * accumulate + i) % len(batches)]
                (module.loss(batch) / accumulate).backward()
            dgm.mask_gradients()
            if clip:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            dgm.advance()
        return module.state_dict(), dgm.masks()


@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (1, 0.1), (2, 0.1)], ids=["plain", "clipped", "both"])
def test_a_fit_is_that_of_dense_storage(accumulate, clip):
    callback = DGMCallback(config())
    pl.seed_everything(0, verbose=False)
    module, _ = fit(callback, module=Double(scheduler=None), accumulate=accumulate, gradient_clip_val=clip)
    expected, masks = dense_without_audit(accumulate, clip)
    assert all(torch.equal(callback.masks()[name], masks[name]) for name in masks)
    assert difference([module.state_dict()], [expected]) < ROUNDING


def test_the_optimizer_is_made_of_packed_parameters():
    seen = []

    class Watched(Double):
        def configure_optimizers(self):
            seen.extend(tuple(p.shape) for p in self.parameters())
            return super().configure_optimizers()

    fit(DGMCallback(config()), module=Watched())
    assert [s for s in seen if len(s) == 3] == [seen[0], seen[2]]
    assert seen[0][1:] == (4, 4)
    assert seen[0][0] == pytest.approx(0.7 * 64, abs=6)


def test_the_table_says_packed(capsys):
    fit(DGMCallback(config()))
    assert "packed" in capsys.readouterr().out


@pytest.mark.parametrize("at", [5, 18], ids=["in a window", "after shrinking"])
def test_resume_is_exact(tmp_path, at):
    _, trainer = fit(DGMCallback(config()), _save(tmp_path, at))
    expected = state_of(trainer)
    _, trainer = fit(DGMCallback(config()), ckpt=tmp_path / f"{at}.ckpt", seed=1)
    assert difference(expected, state_of(trainer)) == 0.0


@pytest.mark.parametrize("kind", [torch.optim.Rprop, LoadsByItself], ids=lambda kind: kind.__name__)
def test_resume_of_other_optimizers_is_exact(tmp_path, kind):
    class Other(Double):
        def configure_optimizers(self):
            return kind(self.parameters(), 1.3e-3)

    _, trainer = fit(DGMCallback(config()), _save(tmp_path, 18), module=Other())
    expected = state_of(trainer)
    _, trainer = fit(DGMCallback(config()), module=Other(), ckpt=tmp_path / "18.ckpt", seed=1)
    assert difference(expected, state_of(trainer)) == 0.0


def _save(folder, at):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == at:
                trainer.save_checkpoint(folder / f"{at}.ckpt")

    return Save()


@pytest.mark.parametrize("storages", [("packed", "dense"), ("dense", "packed")], ids="-".join)
def test_a_checkpoint_of_either_storage_goes_on_in_the_other(tmp_path, storages):
    first, second = storages
    _, trainer = fit(DGMCallback(config(first)), _save(tmp_path, 18))
    expected = state_of(trainer)
    _, trainer = fit(DGMCallback(config(second)), ckpt=tmp_path / "18.ckpt", seed=1)
    assert difference(expected, state_of(trainer)) < ROUNDING


class FrozenFrom9(Double):
    """A layer that trains in the first steps only."""

    def on_train_batch_start(self, *args):
        self.net[0].requires_grad_(self.trainer.global_step < 9)


def test_a_layer_that_is_frozen_before_the_checkpoint_has_trained(tmp_path):
    _, trainer = fit(DGMCallback(config()), _save(tmp_path, 12), module=FrozenFrom9())
    expected = state_of(trainer)
    _, trainer = fit(DGMCallback(config()), ckpt=tmp_path / "12.ckpt", module=FrozenFrom9(), seed=1)
    assert difference(expected, state_of(trainer)) == 0.0


def assert_said(error: BaseException, text: str) -> None:
    if hasattr(error, "add_note"):  # Python 3.10 has no notes: there it is logged
        assert text in str(error.__notes__)


class Followed(Double):
    """Has a frozen copy of its network, as of a target or a teacher."""

    def __init__(self):
        super().__init__()
        self.target = copy.deepcopy(self.net).requires_grad_(False)


@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_the_head_stays_dense_before_a_frozen_copy_of_the_network(storage):
    callback = DGMCallback(config(storage))
    module, _ = fit(callback, module=Followed())
    decisions = {d.name: d for d in callback.decisions()}
    assert [n for n, d in decisions.items() if d.masked] == ["net.0", "net.2"]
    assert decisions["net.4"].why.startswith("output head")
    assert module.state_dict()["net.4.weight"].count_nonzero() == module.net[4].weight.numel()


class TwoHeads(Double):
    """Packed storage knows the head that is registered last; the audit of dense storage finds both."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(32, 4).double()
        self.last = nn.Linear(32, 4).double()

    def loss(self, batch):
        hidden = self.net[:-1](batch[0].double())
        return self.other(hidden).square().mean() + self.last(hidden).square().mean() + super().loss(batch)


def test_a_checkpoint_whose_run_left_dense_what_is_packed_is_refused_with_the_way_out(tmp_path):
    fit(DGMCallback(config("dense", unit=1)), _save(tmp_path, 12), module=TwoHeads())
    with pytest.raises(
        ValueError, match=r"'net\.4' there: output head.*Selection\(exclude=\['net\.4', 'other'\]\)"
    ) as caught:
        fit(DGMCallback(config(unit=1)), ckpt=tmp_path / "12.ckpt", module=TwoHeads())
    assert not getattr(caught.value, "__notes__", [])  # on optimizers
    callback = DGMCallback(config(unit=1, selection=Selection(exclude=["net.4", "other"])))
    fit(callback, ckpt=tmp_path / "12.ckpt", module=TwoHeads())
    assert callback.density == pytest.approx(0.1, abs=0.01)


class Zipped(Followed):
    """Its copy follows by zipped parameters, as is common."""

    def on_train_batch_end(self, *args):
        for ours, theirs in zip(self.net.parameters(), self.target.parameters(), strict=True):
            theirs.data.copy_(0.9 * theirs.data + 0.1 * ours.data)


class Reassigned(Followed):
    """The copy's parameters become others, with which its next forward ends."""

    def loss(self, batch):
        self.target(batch[0].double())
        return super().loss(batch)

    def on_train_batch_end(self, *args):
        for ours, theirs in zip(self.net.parameters(), self.target.parameters(), strict=True):
            theirs.data = 0.9 * theirs.data + 0.1 * ours.data


@pytest.mark.parametrize("cls", [Zipped, Reassigned])
def test_parameters_that_are_zipped_with_a_copys_end_with_a_note_on_state_dict(cls):
    with pytest.raises(RuntimeError, match=r"shape|dimension") as error:
        fit(DGMCallback(config(unit=1)), module=cls())
    assert_said(error.value, "a network and its copy (target of net)")


def test_other_errors_of_such_a_run_have_no_note():
    class Failing(Followed):
        def on_train_batch_end(self, *args):
            raise RuntimeError("a step failed")

    with pytest.raises(RuntimeError, match="a step failed") as error:
        fit(DGMCallback(config()), module=Failing())
    assert not getattr(error.value, "__notes__", [])


class Averaged(Followed):
    """Its copy follows by state dicts."""

    def on_train_batch_end(self, *args):
        ours, theirs = self.net.state_dict(), self.target.state_dict()
        self.target.load_state_dict({name: 0.9 * theirs[name] + 0.1 * ours[name] for name in theirs})


def test_a_copy_follows_by_state_dicts():
    module, _ = fit(DGMCallback(config()), module=Averaged())
    assert not torch.equal(module.target[0].weight, Averaged().target[0].weight)
    assert module.target[0].weight.shape == (32, 32)


class Spare(nn.Module):
    """Has a layer that its forward does not call."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32).double()

    def forward(self, x):
        return x


class Unused(Double):
    """Begins with a layer that no forward calls."""

    def __init__(self):
        super().__init__()
        self.net.insert(0, Spare())


@pytest.mark.filterwarnings("ignore:no gradient has reached the weights of 1 layers")
def test_a_layer_that_no_gradient_reaches_ends_a_resumed_run_as_well(tmp_path):
    with pytest.raises(ValueError, match="in the first 20 steps") as straight:
        fit(DGMCallback(config()), _save(tmp_path, 12), module=Unused())
    with pytest.raises(ValueError, match="in the first 20 steps") as resumed:
        fit(DGMCallback(config()), ckpt=tmp_path / "12.ckpt", module=Unused())
    assert str(resumed.value) == str(straight.value)


def test_a_checkpoint_without_this_callback_goes_on(tmp_path):
    fit(DGMCallback(config()), _save(tmp_path, 18))
    checkpoint = torch.load(tmp_path / "18.ckpt", weights_only=True)
    del checkpoint["callbacks"]["DGMCallback"]
    torch.save(checkpoint, tmp_path / "bare.ckpt")
    callback = DGMCallback(config())
    with pytest.warns(UserWarning, match="masks were recovered from its weights"):
        fit(callback, ckpt=tmp_path / "bare.ckpt", seed=1)
    assert callback.density == pytest.approx(0.1, abs=0.02)


def test_the_best_checkpoint_is_tested_after_the_fit(tmp_path):
    class Tested(Double):
        def test_step(self, batch, batch_idx):
            self.log("test_loss", self.loss(batch), batch_size=1)

    save = ModelCheckpoint(tmp_path, every_n_train_steps=10, save_top_k=-1, filename="{step}")
    module, _ = fit(DGMCallback(config()), save, module=Tested())
    for path in sorted(tmp_path.glob("*.ckpt")):
        plain = Tested()
        plain.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        expected = torch.stack([plain.loss(batch) for batch in loader().batches]).mean().item()
        (found,) = make_trainer().test(
            module, DataLoader(loader().batches, batch_size=None), ckpt_path=path, verbose=False
        )
        assert found["test_loss"] == pytest.approx(expected, rel=1e-6)


def test_a_second_fit_goes_on_from_a_packed_model():
    module, _ = fit(DGMCallback(config()))
    before = copy.deepcopy(module.state_dict())
    for storage in ("packed", "dense"):
        again = DGMCallback(config(storage))
        fit(again, module=module, max_steps=STEPS)
        assert again.density == pytest.approx(0.1, abs=0.02)
        assert module.state_dict().keys() == before.keys()


class Scaled(nn.Linear):
    """Stored whole: its forward is no linear layer's, but uses the weight as it is stored."""

    def forward(self, x):
        return F.linear(x, 0.5 * self.weight, self.bias)


class Centred(nn.Linear):
    """Stored whole, and not masked: its weight in the forward has no zeros."""

    def forward(self, x):
        return F.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


class Whole(Double):
    def __init__(self):
        super().__init__()
        self.net.insert(2, Scaled(32, 32).double())
        self.net.insert(3, Centred(32, 32).double())


def test_layers_that_are_stored_whole_wait_for_the_first_step_also_across_checkpoints(tmp_path):
    straight = DGMCallback(config())
    module, trainer = fit(straight, _save(tmp_path, 5), cls=Whole)
    expected = state_of(trainer)
    resumed = DGMCallback(config())
    _, trainer = fit(resumed, cls=Whole, ckpt=tmp_path / "5.ckpt", seed=1)
    assert difference(expected, state_of(trainer)) == 0.0
    for callback in (straight, resumed):
        decided = {d.name: d for d in callback.decisions()}
        assert decided["net.2"].masked
        assert "stored whole" in decided["net.2"].why
        assert "does not compute with its weight as it is stored (sub())" in decided["net.3"].why
    assert (module.net[2].weight != 0).double().mean() == pytest.approx(0.1, abs=0.02)
    assert (module.net[3].weight != 0).all()
    checkpoint = torch.load(tmp_path / "5.ckpt", weights_only=True)
    del checkpoint["callbacks"]["DGMCallback"]
    torch.save(checkpoint, tmp_path / "bare.ckpt")
    bare = DGMCallback(config())
    with pytest.warns(UserWarning, match="masks were recovered from its weights"):
        fit(bare, cls=Whole, ckpt=tmp_path / "bare.ckpt", seed=1)
    assert bare.masks().keys() == straight.masks().keys()


# --------------------------------------------------------------------------- Lightning's features


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adamw_fused", "adagrad", "rmsprop"])
@pytest.mark.parametrize("settings", [{}, {"precision": "bf16-mixed"}, {"precision": "bf16-true"}], ids=str)
def test_optimizers_and_precisions(optimizer, settings):
    callback = DGMCallback(config())
    module, _ = fit(callback, module=MLP(32, optimizer, "cosine"), max_epochs=5, **settings)
    assert callback.density == pytest.approx(0.1, abs=0.02)
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_convolutions():
    callback = DGMCallback(config(unit=1))
    module, _ = fit(callback, cls=ConvNet)
    assert isinstance(module.features[0], PackedForward)
    assert callback.density == pytest.approx(0.1, abs=0.02)


class Hooked(MLP):
    """The forward of one layer is replaced on the layer itself, as accelerate's hooks do."""

    def __init__(self):
        super().__init__(32)
        layer = self.net[2]
        own = layer.forward
        layer.forward = lambda x: 2.0 * own(x)


@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_a_forward_that_is_set_on_the_layer_itself_has_no_operator(storage):
    dgm = DGMCallback(config(storage, backend="native" if storage == "dense" else "auto"))
    module, _ = fit(dgm, cls=Hooked)
    plain, hooked, _ = dgm.decisions()
    assert plain.backend != "dense"
    assert (hooked.masked, hooked.backend) == (True, "dense")
    assert "no sparse operator for a forward that is set on the module itself" in hooked.why
    assert (module.net[2].weight != 0).double().mean() == pytest.approx(0.1, abs=0.02)
    assert dgm.run_summary()["flops_executed_ratio"] > dgm.run_summary()["flops_ratio"]


class Manual(Double):
    def __init__(self):
        super().__init__(scheduler=None)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        optimizer.step()


def test_manual_optimization():
    callback = DGMCallback(config())
    module, _ = fit(callback, module=Manual())
    assert callback.density == pytest.approx(0.1, abs=0.02)
    assert module.net[0]._parameters["weight"].shape[0] == int(callback.masks()["net.0"].sum())


class TwoOptimizers(Manual):
    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.AdamW(layer.parameters(), 1e-3) for layer in (self.net[:2], self.net[2:])]


@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_phases_in_steps_are_those_of_one_of_several_optimizers(storage):
    callback = DGMCallback(config(storage))
    fit(callback, module=TwoOptimizers(), max_steps=2 * STEPS)
    assert callback.controller.steps == STEPS
    assert callback.density == pytest.approx(0.1, abs=0.02)
    module = TwoOptimizers()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=f"make {STEPS} steps, but the run has {STEPS // 2};"):
        fit(DGMCallback(config(storage)), module=module, max_steps=STEPS)
    assert not [layer for layer in module.modules() if isinstance(layer, PackedForward)]
    assert difference([module.state_dict()], [before]) == 0.0


def test_weights_are_as_they_were_if_the_run_is_too_short():
    module = Double()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="a run of 2 steps is too short"):
        fit(DGMCallback(DGMConfig(EstDgm(), units=Units(size=4), storage="packed")), module=module, max_steps=2)
    assert not [layer for layer in module.modules() if isinstance(layer, PackedForward)]
    assert difference([module.state_dict()], [before]) == 0.0


class SinceMasked(WeightAveraging):
    def should_update(self, step_idx=None, epoch_idx=None):
        return step_idx is not None


@pytest.mark.parametrize("kind", [SinceMasked, EMAWeightAveraging], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
def test_averages_of_weights(kind, first):
    average = kind()
    callback = DGMCallback(config())
    order = (average, callback) if first else (callback, average)
    module, _ = fit(*order, module=Double(scheduler=None))
    masks = callback.masks()
    for name, mask in masks.items():
        whole = module.get_submodule(name).weight
        units = whole.unflatten(1, (-1, 4)).unflatten(0, (-1, 4)).abs().sum((1, 3))
        assert torch.equal(units > 0, mask)


@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
def test_averages_are_validated_from_the_sanity_check_on(first):
    """There the whole weights that the average was copied from change places with active units alone."""
    average = EMAWeightAveraging(decay=0.9)
    callback = DGMCallback(config())
    pl.seed_everything(0, verbose=False)
    module = Double(scheduler=None)
    trainer = make_trainer(*((average, callback) if first else (callback, average)), max_epochs=STEPS // EPOCH_STEPS)
    trainer.fit(module, loader(), loader())
    assert callback.controller.steps == STEPS
    assert trainer.callback_metrics["val_loss"].isfinite()


class MadeLate(Double):
    """Makes its layers in `configure_model`."""

    def __init__(self):
        super().__init__()
        del self.net

    def configure_model(self):
        if not hasattr(self, "net"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(3)
                self.net = MLP(32).net.double()


def test_a_model_made_in_configure_model():
    callback = DGMCallback(config())
    module, _ = fit(callback, module=MadeLate())
    assert isinstance(module.net[0], PackedForward)
    assert "configure_model" not in vars(module)


# --------------------------------------------------------------------------- refusals, errors


def plain(module):
    return [type(m) for m in module.modules()], [sorted(vars(m)) for m in module.modules()]


@pytest.mark.parametrize("failing", ["raising", "matrices"])
def test_weights_are_as_they_were_if_the_fit_does_not_begin(failing):
    class Failing(Double):
        def configure_optimizers(self):
            if failing == "raising":
                raise RuntimeError("no optimizer today")
            return torch.optim.Adafactor(self.parameters())

    module = Failing()
    before, weights = plain(module), copy.deepcopy(module.state_dict())
    expected = {"raising": "no optimizer today", "matrices": "cannot be stored packed under Adafactor"}[failing]
    with pytest.raises((RuntimeError, ValueError), match=expected) as caught:
        fit(DGMCallback(config()), module=module)
    if failing == "raising":
        assert_said(caught.value, "storage='packed' masked weights are parameters of shape")
    assert plain(module)[0] == before[0]
    assert difference([module.state_dict()], [weights]) == 0.0
    fit(DGMCallback(config()), module=Double())


def test_groups_of_computed_weights_are_refused_with_the_way_out():
    class ByLayer(Double):
        def configure_optimizers(self):
            return torch.optim.AdamW(
                [{"params": [self.net[0].weight], "lr": 1e-4}, {"params": self.net[2:].parameters()}]
            )

    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor") as caught:
        fit(DGMCallback(config()), module=ByLayer())
    assert_said(caught.value, "Optimizers get them from named_parameters(), as layer.weight is computed")


class Decaying(Double):
    """Weight decay of what `decays` chooses by name and parameter."""

    def __init__(self, decays):
        super().__init__(scheduler=None)
        self.decays = decays

    def configure_optimizers(self):
        chosen, others = [], []
        for name, parameter in self.named_parameters():
            (chosen if self.decays(name, parameter) else others).append(parameter)
        return torch.optim.AdamW(
            [{"params": chosen, "weight_decay": 3.0}, {"params": others, "weight_decay": 0.0}], 1e-3
        )


def test_weight_decay_by_a_number_of_dimensions_that_packed_weights_do_not_have_is_warned_of():
    with pytest.warns(RuntimeWarning, match=r"none of the packed weights, .* choose by p\.ndim >= 2"):
        fit(DGMCallback(config()), module=Decaying(lambda name, p: p.ndim == 2))


@pytest.mark.parametrize(
    "decays",
    [lambda name, p: p.ndim >= 2, lambda name, p: "weight" in name, lambda name, p: "net.4" in name],
    ids=["dimensions", "weights", "head"],
)
def test_weight_decay_by_other_signs_is_not_warned_of(decays):  # warnings are errors
    fit(DGMCallback(config()), module=Decaying(decays))


def test_a_start_on_the_meta_device_that_fails_ends_with_its_own_error():
    class WithoutValues(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(4))

    with torch.device("meta"):
        module = MLP(32)
        module.factor = WithoutValues()
    with pytest.raises(ValueError, match=r"'factor' \(WithoutValues\) lies on the meta device and has no reset_param"):
        fit(DGMCallback(config()), module=module)
    assert "cpu" not in vars(module)


def test_the_number_of_observed_steps_can_be_left_to_the_schedule():
    module, _ = fit(DGMCallback(DGMConfig(ConstantDensity(0.25), units=Units(size=4), storage="packed")))
    assert isinstance(module.net[0], PackedForward)


def test_muon_of_torch_is_refused_with_the_way_out():
    class Matrices(Double):
        def configure_optimizers(self):
            return torch.optim.Muon([p for p in self.parameters() if p.dim() > 1])

    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    with pytest.raises(ValueError, match="Muon") as caught:
        fit(DGMCallback(config()), module=Matrices())
    assert_said(caught.value, "storage='dense'")


def test_sharding_is_refused_by_name():
    trainer = make_trainer()
    trainer.strategy.__class__ = type("FSDPStrategy", (type(trainer.strategy),), {})
    with pytest.raises(ValueError, match="one device and with DDP, got FSDPStrategy: use storage='dense'"):
        DGMCallback(config()).setup(trainer, Double(), "fit")


def test_compressed_gradients_are_refused():
    with pytest.raises(ValueError, match="sends active units only already"):
        DGMCallback(config(), compress_gradients=True)


def test_a_layer_used_by_itself_ends_the_fit_with_its_name():
    class Odd(Double):
        def forward(self, x):
            return self.net[4](torch.tanh(x @ self.net[0].weight.t()) @ self.net[2].weight.t())

    module = Odd()
    with pytest.raises(ValueError, match=r"its weight is used by itself.*Selection\(exclude"):
        fit(DGMCallback(config()), module=module)
    assert torch.isfinite(module.net[0].weight).all()


class ByGrad(Double):
    def backward(self, loss):
        parameters = list(self.parameters())
        for parameter, slope in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = slope


def test_gradients_that_no_backward_adds_end_the_fit_with_the_layers_names():
    callback = DGMCallback(config())
    with pytest.raises(ValueError, match=r"gradients of 2 layers \(net\.0, net\.2\).*torch\.autograd\.grad"):
        fit(callback, module=ByGrad())
    assert callback.controller.updates == 0
    dense = DGMCallback(config("dense"))
    fit(dense, module=ByGrad())
    assert dense.run_summary()["ended_as_asked"]


class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the whole gradients of the hidden layers that are there at a time in the backward."""

    def __init__(self):
        super().__init__()
        self.made, self.most = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() == 96 * 96:
            self.made.append(torch.multiprocessing.reductions.StorageWeakRef(out.untyped_storage()))
        self.made = [ref for ref in self.made if not ref.expired()]
        self.most = max(self.most, len({ref.cdata for ref in self.made}))
        return out


class Deep(Double):
    """Eight hidden layers of 96 x 96; counts in its backwards."""

    def __init__(self):
        super().__init__(scheduler=None)
        layers = [layer for _ in range(8) for layer in (nn.Linear(96, 96), nn.Tanh())]
        self.net = nn.Sequential(nn.Linear(32, 96), *layers, nn.Linear(96, 1)).double()
        self.peaks = []

    def backward(self, loss):
        with Peak() as peak:
            super().backward(loss)
        self.peaks.append(peak.most)


@pytest.mark.parametrize(("grow", "accumulate", "most"), [("gradient", 1, 3), ("random", 1, 0), ("gradient", 2, None)])
def test_growth_by_gradients_sees_the_whole_gradient_of_one_layer_at_a_time(grow, accumulate, most, monkeypatch):
    # The dense library stands in for products of packed values: expanding a layer would count as well.
    rule = UpdateRule(keep="magnitude", grow=grow)
    callback = DGMCallback(config(update_rule=rule))
    module, _ = fit(callback, module=Deep(), accumulate=accumulate)
    if most is None:
        assert max(module.peaks) >= 8
    else:
        assert max(module.peaks) <= most
