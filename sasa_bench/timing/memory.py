"""Peak memory of one call, and where the figure comes from."""

from __future__ import annotations

import ctypes
import gc

import torch

from sasa_bench.timing.timers import Step


def peak_memory(step: Step, device: str) -> tuple[int | None, str]:
    """Bytes in use at the worst moment of one call above what was in use before it, and where the figure comes from.

    On the CPU: the kernel's high-water mark of resident memory, reset before the call, after the heap was trimmed of
    pages it had kept. On CUDA: torch's allocator. None where the system gives no such figure.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, "CUDA allocator"
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = _status_bytes("VmRSS")
        result = step()
        peak = _status_bytes("VmHWM")
        del result
    except (OSError, AttributeError, KeyError):
        return None, "this system does not show a high-water mark"
    return max(0, peak - before), "high-water mark of resident memory"


def _status_bytes(name: str) -> int:
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines[name].split()[0]) * 1024
