"""What one runs: the command, job configs, and the wiring of adapters and pipeline.

Verbs of the command are functions: ``from workflows import segment``; those in ``__all__``. The
module of a verb is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workflows.batching import batch
    from workflows.certifying import certify
    from workflows.refining import refine
    from workflows.segmenting import plan, segment
    from workflows.standing import status

__all__ = ["batch", "certify", "plan", "refine", "segment", "status"]

_MODULES = {
    "batch": "batching",
    "certify": "certifying",
    "plan": "segmenting",
    "refine": "refining",
    "segment": "segmenting",
    "status": "standing",
}


def __getattr__(name: str) -> Any:  # PEP 562
    if name not in _MODULES:
        raise AttributeError(f"module 'workflows' has no attribute {name!r}")
    return getattr(import_module(f"workflows.{_MODULES[name]}"), name)
