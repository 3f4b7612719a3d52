"""The machine that a study ran on, in words."""
import os
import platform

import torch


def cpu():
    """The CPU by name, and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            names = [line.split(":")[1].strip() for line in f if line.startswith("model name")]
        name = names[0] if names else name
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    return f"{name}, {cores} cores"


def hardware():
    """The GPU by name, or the CPU and its cores."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu()
