"""Small settings and workloads of the benchmarks."""

from lightning_estdgm.tools.bench.kernels._kernels_config import KernelsConfig
from lightning_estdgm.tools.bench.train._train_config import TrainConfig
from lightning_estdgm.tools.bench.train._workloads import GptWorkload

TINY = TrainConfig(
    block_size=16,
    backend="cpu",
    device="cpu",
    densities=2,
    interval=7,
    observe_steps=4,
    dense_steps=2,
    rounds=2,
    profile_steps=1,
)
GPT = GptWorkload(width=64, layers=1, context=16, batch_size=2)
PHASES = ("exploration", "consolidation", "refinement")
ARGUMENTS = (
    *("--quick", "--model", "gpt", "--width", "64", "--layers", "1", "--context", "16", "--batch", "2"),
    *("--block-size", "16", "--backend", "cpu", "--rounds", "1", "--interval", "7", "--profile-steps", "1"),
)

TINY_KERNELS = KernelsConfig(
    shapes=((24, 64, 32),),
    block_sizes=(16, 32),
    densities=(0.5, 1.0),
    dtypes=("float32",),
    most_layers=2,
    image_size=32,
    images=1,
    device="cpu",
    rounds=1,
)
