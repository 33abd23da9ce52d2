"""Import this before SGLang in a process that shall also run where there is no GPU: as env.sh's
export_cpu_environment."""

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cpu_stand_in"))
