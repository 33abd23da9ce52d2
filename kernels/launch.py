"""Launch Triton kernels again and again with little CPU time.

Triton looks at every argument of every call to pick the compiled variant: some 30 us for kernels
with 40 arguments, three times a layer. A prefill of a few tokens is bound by that, not by the GPU.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

logger = logging.getLogger(__name__)

ALIGNMENT = 16  # bytes that Triton assumes of a pointer it once saw aligned
# Versions in whose source JITFunction.run gives a compiled kernel's ``run`` the arguments that
# Launch does. It is private to Triton and has changed before; tests/test_launch.py compares the two
# in the version installed.
KNOWN_TRITON = ("3.6", "3.8")


@functools.cache
def is_known(version: str) -> bool:
    """Whether kernels can be launched past Triton's look at their arguments; logs once per version
    if not."""
    known = ".".join(version.split(".")[:2]) in KNOWN_TRITON
    if not known:
        logger.warning(
            "RotateK knows the private launch of Triton %s, not of the installed %s, and uses the "
            "public one: a prefill of few tokens takes some 0.1 ms more a layer.",
            " and ".join(KNOWN_TRITON),
            version,
        )
    return known


class Launch:
    """A kernel with its constants, in the order of its signature, after all other arguments.

    ``num_activations``: that many of the first arguments are tensors that differ from call to call;
    everything else must keep type, alignment and divisibility by 16, as buffers, strides and sizes
    of one server do.
    """

    def __init__(
        self, kernel: Any, num_activations: int, constants: dict[str, Any], **options: Any
    ) -> None:
        self._kernel = kernel
        self._num_activations = num_activations
        self._constants = constants
        self._options = options
        self._keeps_compiled = not isinstance(kernel, InterpretedFunction) and is_known(
            triton.__version__
        )
        self._compiled: Any = None

    def __call__(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        is_odd = False
        for tensor in arguments[: self._num_activations]:
            is_odd |= tensor.data_ptr() % ALIGNMENT != 0
        if self._compiled is None or is_odd:
            compiled = self._kernel[grid](*arguments, **self._constants, **self._options)
            if self._compiled is None and self._keeps_compiled:
                self._compiled = compiled
            return
        compiled = self._compiled
        stream = torch.cuda.current_stream().cuda_stream
        hooks = triton.knobs.runtime
        compiled.run(
            *grid, stream, compiled.function, compiled.packed_metadata, None,
            hooks.launch_enter_hook, hooks.launch_exit_hook, *arguments, *self._constants.values(),
        )  # fmt: skip
