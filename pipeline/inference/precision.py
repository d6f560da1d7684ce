"""Which floats a device computes in; resolved once, for the plan, with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.errors import PlanError

if TYPE_CHECKING:
    import torch

_BF16_FLAGS = ("amx_bf16", "avx512_bf16")
"""Processor flags with which oneDNN convolves in bfloat16 faster than in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Floats and memory format of the network."""

    name: Literal["fp32", "bf16"]
    channels_last: bool

    why: str
    """One line for the log and the manifest."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and features; logits are float32 in any case."""
        import torch

        return torch.bfloat16 if self.name == "bf16" else torch.float32


def resolve_precision(asked: Literal["auto", "fp32", "bf16"], *, device: str) -> Precision:
    """Choose the floats for a device.

    Args:
        asked: ``auto`` is bf16 where the device computes it natively, else fp32.
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        PlanError: bf16 asked of a device that only emulates it, or an unknown device.
    """
    reason = _native_bf16(device)
    if asked == "fp32":
        return Precision(name="fp32", channels_last=True, why="fp32 asked")
    if reason:
        return Precision(name="bf16", channels_last=True, why=f"{asked}: {reason}")
    if asked == "bf16":
        raise PlanError(
            f"precision bf16 asked, {device} has no native bfloat16 arithmetic: use fp32 or auto"
        )
    return Precision(name="fp32", channels_last=True, why=f"auto: {device} has no native bfloat16")


def fix_kernels() -> None:
    """Have this process's devices compute in the floats asked for, the same way every time."""
    import torch

    # TF32 keeps 10 bits of fp32's 23, and a benchmarked algorithm differs from run to run.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def _native_bf16(device: str) -> str:
    """Why the device computes bfloat16 natively; empty where it does not."""
    import torch

    kind = torch.device(device).type
    if kind == "cpu":
        flags = processor_flags()
        return next((f"the processor has {flag}" for flag in _BF16_FLAGS if flag in flags), "")
    if kind != "cuda":
        raise PlanError(f"device {device!r} asked; there are: cpu, cuda, cuda:N")
    if not torch.cuda.is_available():
        raise PlanError(f"device {device} asked, torch finds no CUDA device here: use cpu")
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return f"{torch.cuda.get_device_name(device)} has bfloat16 tensor cores" if native else ""


def processor_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Instruction sets of the processor, as Linux names them; empty on other systems."""
    if not cpuinfo.is_file():
        return frozenset()
    lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    flags = (line.partition(":")[2] for line in lines if line.startswith("flags"))
    return frozenset(next(flags, "").split())
