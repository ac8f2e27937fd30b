"""masked_experts: each expert's product with its own rows, as masked_linear computes it, in one operator."""

import pytest
import torch
from torch.nn import functional as F

from lightning_estdgm.sparse._expert_topology import ExpertTopology
from lightning_estdgm.sparse._experts import masked_experts
from lightning_estdgm.sparse._linear import masked_linear

EXPERTS, OUT, INNER, BLOCK = 4, 48, 32, 16
COUNTS = {"even": [3, 3, 3, 3], "some without rows": [0, 5, 0, 2], "rows left over": [1, 2, 0, 3], "none": [0] * 4}


def stack_topology(seed=0):
    mask = torch.rand(EXPERTS * OUT // BLOCK, INNER // BLOCK, generator=torch.Generator().manual_seed(seed)) < 0.5
    return ExpertTopology.from_mask(mask, EXPERTS, BLOCK)


def operands(counts, transposed=False, dtype=torch.float64, left_over=2):
    """Return rows, the parameter as stored, counts and an output gradient."""
    generator = torch.Generator().manual_seed(1)
    rows = sum(counts) + left_over
    x = torch.randn(rows, INNER, generator=generator, dtype=dtype, requires_grad=True)
    shape = (EXPERTS, INNER, OUT) if transposed else (EXPERTS, OUT, INNER)
    stored = torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True)
    return x, stored, torch.tensor(counts), torch.randn(rows, OUT, generator=generator, dtype=dtype)


def one_by_one(x, matrices, counts, topology, **settings):
    """The oracle: masked_linear of each expert's rows; zero for the rest."""
    *parts, rest = x.split([*counts.tolist(), len(x) - int(counts.sum())])
    products = [
        masked_linear(rows, m, None, t, backend="reference", **settings)
        for rows, m, t in zip(parts, matrices, topology.experts(), strict=True)
    ]
    return torch.cat([*products, rest.new_zeros(len(rest), matrices.shape[1])])


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("transposed", [False, True], ids=["as stored", "transposed view"])
@pytest.mark.parametrize("settings", [{}, {"dense_grad": True}, {"frozen": True}], ids=str)
def test_outputs_and_gradients_are_those_of_each_expert_by_itself(counts, transposed, settings):
    topology = stack_topology()
    x, stored, rows, dy = operands(counts, transposed)
    stack = stored.transpose(1, 2) if transposed else stored
    y = masked_experts(x, stack, rows, topology, backend="cpu", **settings)
    wanted = one_by_one(x, stack, rows, topology, **settings)
    torch.testing.assert_close(y, wanted)
    got = torch.autograd.grad(y, [x, stored], dy)
    torch.testing.assert_close(got, torch.autograd.grad(wanted, [x, stored], dy))
    assert got[1].stride() == stored.stride()


def test_backends_agree():
    topology = stack_topology()
    x, stack, rows, dy = operands(COUNTS["some without rows"], dtype=torch.float32)
    results = []
    for backend in ("reference", "cpu", "native"):
        y = masked_experts(x, stack, rows, topology, backend=backend)
        results.append((y, *torch.autograd.grad(y, [x, stack], dy)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_new_masks_are_followed_in_place():
    topology, later = stack_topology(), stack_topology(seed=5)
    pointers = topology.col_idx.data_ptr()
    topology.update_(torch.cat([expert.mask() for expert in later.experts()]))
    assert topology.col_idx.data_ptr() == pointers
    x, stack, rows, _ = operands(COUNTS["even"])
    torch.testing.assert_close(
        masked_experts(x, stack, rows, topology, backend="cpu"), one_by_one(x, stack, rows, later)
    )
    moved = later.apply(torch.clone).transpose()
    assert moved.shape == (EXPERTS, INNER, OUT)
    assert all(torch.equal(a.mask(), b.mask().t()) for a, b in zip(moved.experts(), later.experts(), strict=True))


def test_torch_accepts_the_operator():
    topology = stack_topology()
    x, stack, rows, _ = operands(COUNTS["some without rows"])
    lists = (topology.row_ptr, topology.col_idx, topology.col_ptr, topology.row_idx, [BLOCK, BLOCK])
    torch.library.opcheck(torch.ops.estdgm.masked_experts.default, (x, stack, rows, *lists, "cpu", False, False))


def test_a_compiled_graph_is_whole_and_takes_other_counts_and_masks():
    torch.compiler.reset()
    topology = stack_topology()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, stack, rows):
        return masked_experts(x, stack, rows, topology, backend="cpu")

    x, stack, _, dy = operands(COUNTS["even"])
    for counts, seed in (([3, 3, 3, 3], 0), ([12, 0, 0, 2], 5)):
        topology.update_(torch.cat([expert.mask() for expert in stack_topology(seed).experts()]))
        rows = torch.tensor(counts)
        y, wanted = compiled(x, stack, rows), one_by_one(x, stack, rows, topology)
        torch.testing.assert_close(y, wanted)
        torch.testing.assert_close(torch.autograd.grad(y, [x, stack], dy), torch.autograd.grad(wanted, [x, stack], dy))


def test_gradients_by_torch_func():
    topology = stack_topology()
    x, stack, rows, _ = operands(COUNTS["rows left over"])

    def total(x, stack):
        return masked_experts(x, stack, rows, topology, backend="cpu").sin().sum()

    torch.testing.assert_close(
        torch.func.grad(total, argnums=(0, 1))(x, stack), torch.autograd.grad(total(x, stack), (x, stack))
    )


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, on its first dual number
def test_tangents_go_forward():
    topology = stack_topology()
    x, stack, rows, _ = (t.detach() for t in operands(COUNTS["rows left over"]))

    def product(x, stack):
        return masked_experts(x, stack, rows, topology, backend="cpu")

    _, tangent = torch.func.jvp(product, (x, stack), (x.cos(), stack.cos()))
    torch.testing.assert_close(tangent, product(x.cos(), stack) + product(x, stack.cos()))


def test_autocast_casts_as_linear_does():
    topology = stack_topology()
    x, stack, rows, _ = operands(COUNTS["even"], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_experts(x, stack, rows, topology, backend="cpu")
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == stack.grad.dtype == torch.float32


def test_gradients_of_gradients_are_those_of_masked_products():
    topology = stack_topology()
    x, stack, rows, dy = operands(COUNTS["even"])
    active = torch.stack([matrix.weight_mask() for matrix in topology.experts()])
    found = []
    for product in (
        lambda: masked_experts(x, stack, rows, topology, backend="cpu"),
        lambda: torch.cat(
            [a @ (w * m).t() for a, w, m in zip(x[: rows.sum()].split(rows.tolist()), stack, active, strict=True)]
        ),
    ):
        y = product()[: rows.sum()]
        first = torch.autograd.grad(y.sin(), (x, stack), dy[: len(y)], create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), (x, stack))
        found.append((*first, *second))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x, w, n: (x[:, 1:], w, n), r"x must have shape \[rows, 32\], got \(14, 31\)"),
        (lambda x, w, n: (x, w[:2], n), r"weight has shape \(2, 48, 32\), but the topology is for \(4, 48, 32\)"),
        (lambda x, w, n: (x, w, n[:3]), "rows of 4 experts"),
        (lambda x, w, n: (x.float(), w, n), "one dtype"),
    ],
)
def test_what_does_not_fit_is_refused(change, said):
    x, stack, rows, _ = operands(COUNTS["even"])
    with pytest.raises((TypeError, ValueError), match=said):
        masked_experts(*change(x, stack, rows), stack_topology(), backend="cpu")


def test_a_backend_that_cannot_run_it_is_refused():
    x, stack, rows, _ = operands(COUNTS["even"], dtype=torch.float32)
    mask = torch.ones(EXPERTS * OUT // 4, INNER // 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="'cpu' cannot run this layer: it needs blocks of at least 8"):
        masked_experts(x, stack, rows, ExpertTopology.from_mask(mask, EXPERTS, 4), backend="cpu")


def test_rows_are_not_those_of_a_dense_product():
    x, stack, rows, _ = operands(COUNTS["even"])
    y = masked_experts(x, stack, rows, stack_topology(), backend="cpu")
    assert not torch.allclose(y[:3], F.linear(x[:3], stack[0]))
