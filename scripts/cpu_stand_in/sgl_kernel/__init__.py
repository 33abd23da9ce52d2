"""Stand-in for the CUDA `sgl_kernel` wheel on a machine without an NVIDIA driver.

The wheel loads libcuda.so.1 when it is imported, and SGLang imports it from every process, before
any plugin is loaded. With this directory first on PYTHONPATH the import succeeds and SGLang's CPU
engine (SGLANG_USE_CPU_ENGINE=1) starts. What SGLang needs from it at import time:

- `from sgl_kernel import <name>_cpu`: any such name is given, as a function that raises when
called;
- `torch.ops.sgl_kernel.<name>_cpu`: the schemas below, without an implementation;
- `nn.Module.to(device)`, with which LLaVA in the original layout moves its vision tower: gives it
the server's dtype, too.

Every other name raises AttributeError, as a missing symbol of the wheel would. In particular
`convert_weight_packed` stays undefined: SGLang takes its presence for the sign of Intel AMX
kernels.
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


_to = torch.nn.Module.to


def _to_with_dtype_of_server(module, *args, **kwargs):
    """SGLang loads LLaVA's tower as float16 whatever --dtype says, then moves it to a device while
    the default dtype is the server's. The projector behind the tower has that dtype, and float32
    times float16 is an error."""
    module = _to(module, *args, **kwargs)
    is_tower = type(module).__name__ in ("CLIPVisionModel", "SiglipVisionModel")
    if is_tower and len(args) == 1 and isinstance(args[0], torch.device):
        module = _to(module, torch.get_default_dtype())
    return module


if not torch.cuda.is_available():
    torch.nn.Module.to = _to_with_dtype_of_server


def __getattr__(name: str):
    if not name.endswith("_cpu"):
        raise AttributeError(f"the CPU stand-in for sgl_kernel has no {name}")

    def not_implemented(*args, **kwargs):
        raise NotImplementedError(
            f"the CPU stand-in for sgl_kernel has no implementation of {name}"
        )

    not_implemented.__name__ = name
    return not_implemented
