"""MNN in a process of its own, run as a script: ``convert ARGUMENTS``, or ``run FILE THREADS``.

MNN's command installs a package and reports its use: `convert` calls the converter behind it and nothing else. Both may
crash or hang on a network that they cannot hold, which ends this process only. `run` reads pickled lists of arrays from
the standard input and answers each with a pickled list of the outputs.
"""

from __future__ import annotations

import os
import pickle
import sys
from typing import Any


def _run(path: str, threads: int, answers: Any) -> None:
    import MNN
    import numpy

    expr: Any = MNN.expr
    manager = MNN.nn.create_runtime_manager(({"backend": 0, "precision": "high", "numThread": threads},))
    module = MNN.nn.load_module_from_file(path, [], [], runtime_manager=manager)

    def variable(array: Any) -> Any:
        is_float = array.dtype.kind == "f"
        array = numpy.ascontiguousarray(array, dtype=numpy.float32 if is_float else numpy.int32)
        made = expr.const(array, list(array.shape), expr.NCHW, expr.float if is_float else expr.int)
        return expr.convert(made, expr.NC4HW4) if array.ndim == 4 else made  # the layout that convolutions compute in

    while True:
        try:
            arrays = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        outputs = module.onForward([variable(array) for array in arrays])
        pickle.dump([numpy.array(expr.convert(out, expr.NCHW).read()) for out in outputs], answers)
        answers.flush()


if __name__ == "__main__":
    task, *arguments = sys.argv[1:]
    if task == "convert":
        import _tools  # of the distribution MNN

        _tools.mnnconvert(["mnnconvert", *arguments])
    else:
        own_output = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)  # what MNN prints is no answer
        _run(arguments[0], int(arguments[1]), own_output)
