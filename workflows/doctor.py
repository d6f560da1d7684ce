"""``doctor``: what this machine can do, and what stands in the way."""

from __future__ import annotations

import importlib.util
import os
import shutil
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import Any

import psutil
import torch

from pipeline.crf.engine import ABSENT_ENGINES, installed
from pipeline.execution.identity import PACKAGES
from pipeline.inference.precision import resolve_precision

LIBRARIES = ("ray", "torch", "torchvision", "rasterio", "nibabel", "zarr", "mlflow", "pydensecrf2")


def examine() -> dict[str, Any]:
    """Findings by name; ``problems`` lists what needs doing."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = resolve_precision("auto", device=device)
    memory = psutil.virtual_memory()
    problems = _conflicts()
    if not installed("native"):
        problems.append(f"CRF: {ABSENT_ENGINES['native']}")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory.total / 1e9, 1),
        "memory_free_gb": round(memory.available / 1e9, 1),
        "disk_free_gb": round(shutil.disk_usage(".").free / 1e9, 1),
        "device": device,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "precision": f"{precision.name}, {precision.why}",
        "demo_volume": importlib.util.find_spec("nilearn") is not None,
        "versions": {name: _version(name) for name in ("terravox", *LIBRARIES)},
        "problems": problems,
    }


def _conflicts() -> list[str]:
    """Other distributions that own one of the three top-level package names."""
    owners = packages_distributions()
    return [
        f"the package {name} also comes from {other}: pip uninstall {other}"
        for name in PACKAGES
        for other in sorted(set(owners.get(name, [])) - {"terravox"})
    ]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
