"""What this machine is, for whoever reads a measurement or asks what a build here would run."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np

from uwm_deploy.runtime.tensorrt import gpu_reason

_CPUS = Path("/proc/cpuinfo")


def machine() -> dict[str, str]:
    """What does not change during a run: processor, cores, threads, versions of what executes, GPU."""
    found = {
        "cpu": processor(),
        "cpus": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} usable",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    if not gpu_reason():
        found["gpu"] = _said(*gpus("name,driver_version,clocks.max.sm,clocks.max.mem,power.limit"))
    return found


def clocks() -> dict[str, str]:
    """What may change during a run: clocks of the processor and the GPU, and how busy the machine is."""
    rates = [float(line.partition(":")[2]) for line in _lines(_CPUS) if line.startswith("cpu MHz")]
    found = {"load": " ".join(f"{value:.2f}" for value in os.getloadavg())}
    if rates:
        found["cpu_mhz"] = f"{min(rates):.0f} to {max(rates):.0f}"
    if not gpu_reason():
        found["gpu"] = _said(*gpus("clocks.sm,clocks.mem,temperature.gpu,clocks_throttle_reasons.active"))
    return found


def processor() -> str:
    """Name of the processor, as the system gives it."""
    model = next((line.partition(":")[2].strip() for line in _lines(_CPUS) if line.startswith("model name")), "")
    return model or platform.processor() or platform.machine()


def gpus(fields: str) -> tuple[list[str], str]:
    """What ``nvidia-smi`` says of every GPU.

    Args:
        fields: What to ask for, as its ``--query-gpu`` names it.

    Returns:
        One line per GPU; and why there is none, empty where there is one.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], "no NVIDIA driver found"
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603 -- fixed words
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi does not answer: {error}"
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode != 0:
        return [], "; ".join(lines) or "nvidia-smi failed"
    return lines, "" if lines else "nvidia-smi lists no GPU"


def _said(lines: list[str], reason: str) -> str:
    return "; ".join(lines) or reason


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
