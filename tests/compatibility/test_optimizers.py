"""Optimizers of torch and of other libraries, each through a whole small schedule with moving masks.

Run as a program, it prints the table of docs/guides/optimizers.md; libraries that are not installed are left out:

    PYTHONPATH=.:tests python tests/compatibility/test_optimizers.py
"""

import importlib.util

import pytest
import torch

from helpers.optimizer_cases import OTHERS, STEPS, TORCH, OptimizerCase, run_case, table

EVERY = [*TORCH, *OTHERS]


def is_installed(tried: OptimizerCase) -> bool:
    return importlib.util.find_spec(tried.library.split(".")[0]) is not None and hasattr(torch.optim, "Muon")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("tried", EVERY, ids=str)
def test_a_whole_schedule_is_exact_and_learns(tried):
    if tried in OTHERS:
        pytest.importorskip(tried.library.split(".")[0])
    if not hasattr(torch.optim, tried.name) and tried in TORCH:
        pytest.skip(f"this torch has no {tried.name}")
    scaled, plain = run_case(tried), run_case(tried, exponent=0.0)
    assert (scaled.updates, scaled.nonzero) == (10, 0)
    assert scaled.density == pytest.approx(0.1, abs=0.002)
    assert scaled.last < 0.9 * scaled.first
    assert scaled.last < 2.5 * plain.last
    resumed = run_case(tried, resume_at=STEPS // 2 - 3)
    for name, weight in scaled.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


if __name__ == "__main__":
    print(table([tried for tried in EVERY if is_installed(tried)]))
