"""Linear layers on active blocks for tests: masks, operands, modes, and which backends run where."""

import torch

from lightning_estdgm.sparse._linear import masked_linear
from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends._protocol import backends, get_backend

BACKENDS = sorted(backends())


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


# One rounding of the result to the dtype (half a unit in the last place), and before it the accumulation of up to
# 256 products of order one, in float32 (2**-24 * 256 * E|ab| = 1e-5 where no error cancels another's) or float64.
TOLERANCES = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 3e-5},
    torch.bfloat16: {"rtol": 2**-8, "atol": 3e-5},
    torch.float16: {"rtol": 2**-11, "atol": 3e-5},
}


MASKS = {
    "empty row and column": lambda r, c: (
        (_random(r, c, 0.5).index_fill_(0, torch.tensor(0), False)).index_fill_(1, torch.tensor(c - 1), False).bool()
    ),
    "density 0.3": lambda r, c: _random(r, c, 0.3),
    "every other block": lambda r, c: (torch.arange(r)[:, None] + torch.arange(c)) % 2 == 0,
    "full": lambda r, c: torch.ones(r, c, dtype=torch.bool),
    "empty": lambda r, c: torch.zeros(r, c, dtype=torch.bool),
}


MODES = {
    "plain": {},
    "dense_grad": {"dense_grad": True},
    "frozen": {"frozen": True},
    "frozen, dense_grad": {"frozen": True, "dense_grad": True},
}


def _random(rows: int, cols: int, density: float) -> torch.Tensor:
    return torch.rand(rows, cols, generator=torch.Generator().manual_seed(3)) < density


def make_topology(rows=2, cols=3, block_size=16, mask="every other block", device="cpu") -> BlockTopology:
    return BlockTopology.from_mask(MASKS[mask](rows, cols).to(device), block_size)


def make_operands(topology, tokens, dtype, seed=0):
    """x, weight, bias, dy: values that the dtype holds exactly, in float64."""
    generator = torch.Generator().manual_seed(seed)
    out, features = topology.shape
    shapes = ((tokens, features), (out, features), (out,), (tokens, out))
    return [torch.randn(*s, generator=generator).to(dtype).double().to(topology.device) for s in shapes]


def run(x, weight, bias, dy, topology, **kwargs):
    """y, dx, dw, dbias."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = masked_linear(*leaves, topology, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def make_arguments(**change):
    """Positional and keyword arguments of `masked_linear`, some of them changed."""
    topology = make_topology()  # (32, 48)
    x, weight, bias, _ = (t.float() for t in make_operands(topology, 5, torch.float32))
    arguments = {"x": x, "weight": weight, "bias": bias, "topology": topology, "backend": "cpu", **change}
    return [arguments.pop(name) for name in ("x", "weight", "bias", "topology")], arguments


def refusal(backend, device="cpu", dtype=torch.float32, block_size=16):
    topology = make_topology(block_size=block_size, device=device)
    return get_backend(backend).unsupported(torch.device(device), dtype, topology)


ON_CPU = [name for name in BACKENDS if refusal(name) is None]


def widest(backend):
    """The widest dtype that the backend takes on the CPU."""
    return next(dtype for dtype in (torch.float64, torch.float32) if refusal(backend, dtype=dtype) is None)
