"""`rebuild_reducer_`: DDP's buckets after parameters have changed their sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel


def rebuild_reducer_(wrapper: DistributedDataParallel) -> None:
    """Give a DDP wrapper new buckets for its parameters as they are now; all ranks have to call it.

    Nothing is broadcast: every rank has changed its parameters alike. It is what torch does where a wrapper is
    unpickled (``DistributedDataParallel.__setstate__``), with the registered communication hooks kept.

    Args:
        wrapper: the wrapper, between a step and the next forward; none of a static graph.

    """
    ddp: Any = wrapper
    ddp.reducer = None  # its hooks on the parameters' gradients go with it
    parameters, expect_sparse = ddp._build_params_for_reducer()
    names = ddp._build_debug_param_to_name_mapping(parameters)
    ddp._ddp_init_helper(parameters, expect_sparse, names, ddp.static_graph)
    for hook, state in ddp._comm_hooks:
        torch._C._distributed_c10d._register_comm_hook(ddp.reducer, state, hook)
