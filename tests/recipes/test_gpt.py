"""The GPT: what any such model must satisfy, and its training."""

import math
from itertools import pairwise

import pytest
import torch
from lightning import Trainer

from helpers.recipe_data import small_text
from lightning_estdgm.recipes import ByteGPT, StdlibText
from lightning_estdgm.recipes._rates import warmup_cosine


def tiny(**settings):
    return ByteGPT(**{"width": 32, "layers": 2, "heads": 2, "context": 16, **settings})


def test_a_prediction_depends_on_earlier_bytes_only():
    torch.manual_seed(0)
    model = tiny()
    x = torch.randint(256, (2, 16))
    changed = x.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    with torch.no_grad():
        before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert all(not torch.equal(before[:, t], after[:, t]) for t in range(9, 16))


def test_an_untrained_model_knows_nothing():
    torch.manual_seed(0)
    x = torch.randint(256, (8, 17))
    loss = tiny().loss((x[:, :-1], x[:, 1:]))
    assert float(loss.detach()) == pytest.approx(math.log(256), rel=0.02)


def test_the_default_model_has_the_size_that_the_demo_promises():
    with torch.device("meta"):
        model = ByteGPT()
    assert 5e6 < sum(p.numel() for p in model.parameters()) < 10e6
    assert model.blocks[0].fc.weight.shape == (2048, 512)


def test_training_decays_matrices_only_and_follows_the_schedule(tmp_path):
    model, rates = tiny(lr=0.01, weight_decay=0.3, warmup=0.2), []
    trainer = Trainer(
        max_steps=10, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    model.on_train_batch_end = lambda *_: rates.append(trainer.optimizers[0].param_groups[0]["lr"])
    trainer.fit(model, datamodule=StdlibText(context=16, batch_size=4, path=small_text(tmp_path)))
    decayed, plain = trainer.optimizers[0].param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in plain["params"]} == {1}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    assert rates == pytest.approx([0.01 * warmup_cosine(step, 10, 0.2) for step in range(1, 11)])
    assert rates[-1] == pytest.approx(0.001)


@pytest.mark.parametrize(("precision", "fused"), [("32-true", True), ("bf16-mixed", False)])
def test_gradients_are_clipped_in_any_precision(precision, fused, tmp_path):
    """Lightning refuses to clip for a fused optimizer under mixed precision."""
    model = ByteGPT(width=16, layers=1, heads=2, context=16)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        precision=precision,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=StdlibText(context=16, batch_size=2, path=small_text(tmp_path)))
    assert trainer.global_step == 2
    assert trainer.optimizers[0].defaults["fused"] == fused


def test_a_run_of_unknown_length_is_refused(tmp_path):
    trainer = Trainer(
        max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    with pytest.raises(ValueError, match="needs a run of known length for its cosine, got inf; set max_steps"):
        trainer.fit(tiny(), datamodule=StdlibText(context=16, batch_size=4, path=small_text(tmp_path)))


def test_warmup_and_cosine_have_the_promised_ends():
    factors = [warmup_cosine(step, 200, 0.1) for step in range(201)]
    assert factors[:20] == pytest.approx([(i + 1) / 20 for i in range(20)])
    assert max(factors) == factors[20] == 1.0
    assert all(a > b for a, b in pairwise(factors[20:]))
    assert factors[-1] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 33}, "width: got 33, expected a multiple of heads=2"),
        ({"layers": 0}, "layers: got 0, expected at least 1"),
        ({"lr": 0.0}, "lr: got 0.0, expected a positive number"),
        ({"lr": math.inf}, "lr: got inf, expected a positive number"),
        ({"warmup": 1.0}, r"warmup: got 1.0, expected a fraction in \[0, 1\)"),
    ],
)
def test_bad_settings_of_the_model_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


def test_generation_with_a_cache_is_that_without() -> None:
    """One token a step, each by a forward over the whole text."""
    torch.manual_seed(0)
    model = ByteGPT(width=32, layers=2, heads=2, context=12).eval()
    text = torch.randint(0, 256, (3, 4))
    found = model.generate(text, 8)
    for _ in range(8):
        text = torch.cat([text, model(text)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, text)
    assert torch.equal(model.generate(text, 0), text)
    for prompt, count in ((text, 1), (text[:, :0], 4)):
        with pytest.raises(ValueError, match="expected 1 to 12 in all"):
            model.generate(prompt, count)
