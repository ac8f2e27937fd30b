"""Drop fractions: shares in stages, and what is above a density."""

import re

import pytest

from lightning_estdgm.method._schedules import DropTo, StagedDrop


def test_drop_shares():
    staged = StagedDrop((0.2, 0.1, 0.0), (0.5, 0.75))
    assert [staged(p, 0.1) for p in (0.0, 0.49, 0.5, 0.74, 0.75, 1.0)] == [0.2, 0.2, 0.1, 0.1, 0.0, 0.0]
    assert DropTo(0.1)(0.3, 0.15) == pytest.approx(1 / 3)
    assert DropTo(0.1)(0.3, 0.05) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: StagedDrop((0.2, 0.1)), "one share more than borders, got (0.2, 0.1) and ()"),
        (lambda: StagedDrop((1.0,)), "shares must lie in [0, 1), got (1.0,)"),
        (lambda: StagedDrop((0.2, 0.1, 0.0), (0.7, 0.5)), "borders must rise within (0, 1), got (0.7, 0.5)"),
        (lambda: DropTo(0.0), "density must lie in (0, 1], got 0.0"),
    ],
)
def test_drop_shares_that_make_no_sense_are_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
