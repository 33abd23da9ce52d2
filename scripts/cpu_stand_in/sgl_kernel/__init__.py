"""Stand-in for the CUDA `sgl_kernel` wheel on a machine without an NVIDIA driver.

The wheel loads libcuda.so.1 when it is imported, and SGLang imports it from every process, before
any plugin is loaded. With this directory first on PYTHONPATH the import succeeds and SGLang's CPU
engine (SGLANG_USE_CPU_ENGINE=1) starts. What SGLang needs from it at import time:

- `from sgl_kernel import <name>_cpu`: any such name is given, as a function that raises when called;
- `torch.ops.sgl_kernel.<name>_cpu`: the schemas below, without an implementation;
- `nn.Module.cuda()`, which the LLaVA model calls on its vision tower: leaves the module where it is.

Every other name raises AttributeError, as a missing symbol of the wheel would. In particular
`convert_weight_packed` stays undefined: SGLang takes its presence for the sign of Intel AMX kernels.
"""

import torch

__version__ = "0.0.0+cpu"

_SCHEMAS_READ_AT_IMPORT = (
    "fused_dual_residual_rmsnorm_cpu",
    "fused_moe_router_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
    "fused_sigmoid_mul_cpu",
    "rmsnorm_cpu",
)

# The library object owns the schemas: they vanish with it, so the module keeps it.
_library = torch.library.Library("sgl_kernel", "FRAGMENT")
for _schema in _SCHEMAS_READ_AT_IMPORT:
    _library.define(f"{_schema}(Tensor x) -> Tensor")


def _stay_on_cpu(module, device=None):
    """SGLang loads LLaVA's tower as float16 whatever --dtype says, and then calls this while the default dtype is
    the server's. The projector behind the tower has that dtype, so the tower must have it too."""
    return module.to(torch.get_default_dtype())


if not torch.cuda.is_available():
    torch.nn.Module.cuda = _stay_on_cpu


def __getattr__(name: str):
    if not name.endswith("_cpu"):
        raise AttributeError(f"the CPU stand-in for sgl_kernel has no {name}")

    def not_implemented(*args, **kwargs):
        raise NotImplementedError(f"the CPU stand-in for sgl_kernel has no implementation of {name}")

    not_implemented.__name__ = name
    return not_implemented
