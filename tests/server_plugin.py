"""A plugin beside RotateK's, for servers under test on a CPU.

The server writes what its segments' rows decode to, for a reference outside it. A reference that
codes the same image by itself agrees within the codes' error only: Keys that differ in the last
bits turn the principal components by more, and each code that flips moves the residual. And it
takes --kv-cache-dtype fp8_e4m3, which stock has on a CPU for its own kernels alone, with Intel's
AMX.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import torch

DIRECTORY = "ROTATEK_TEST_DUMP"


def environment(directory: Path, dump: Path | None = None) -> dict[str, str]:
    """What a server needs to find the plugin, which is installed in ``directory``, and to write
    into ``dump``."""
    info = directory / "rotatek_test_plugin-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: rotatek-test-plugin\nVersion: 1.0\n"
    )
    (info / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\nrotatek_test = server_plugin:register\n"
    )
    path = [str(directory), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    if dump is not None:
        dump.mkdir(exist_ok=True)
        variables[DIRECTORY] = str(dump)
    return variables


def register() -> None:
    from sglang.srt.mem_cache import kv_cache_configurator

    kv_cache_configurator.cpu_has_amx_support = lambda: True
    kv_cache_configurator.attention_backends = lambda: {"intel_amx"}
    if DIRECTORY in os.environ:
        _dump_rows()


def _dump_rows() -> None:
    from sglang_rotatek.attention import backend
    from sglang_rotatek.kernels import reference

    store_layer, counts = backend.RotateKTorchBackend._store_segment, Counter()

    def store_and_dump(self, pools, segment, q, k, v):
        result = store_layer(self, pools, segment, q, k, v)
        layer = pools.z.storage_offset() // self.token_to_kv_pool.visual.z.stride(0)
        path = Path(os.environ[DIRECTORY], f"{layer}-{counts[layer]}.pt")
        torch.save(reference.expand(segment.slots, pools), path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
        counts[layer] += 1
        return result

    backend.RotateKTorchBackend._store_segment = store_and_dump


class Dumped:
    """The decoded Keys and Values [n, H, D] of each layer's segments, in the order in which they
    were stored from now on: the host's warm-up may have had pictures."""

    def __init__(self, dump: Path) -> None:
        self._dump = dump
        self._read = Counter(int(path.name.split("-")[0]) for path in dump.glob("*.pt"))
        self._first = self._read.total()

    def next(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = torch.load(self._dump / f"{layer}-{self._read[layer]}.pt")
        self._read[layer] += 1
        return tensors

    def is_read(self) -> bool:
        """Whether the reference stored as many segments as the server."""
        return len(list(self._dump.glob("*.pt"))) == self._read.total() > self._first
