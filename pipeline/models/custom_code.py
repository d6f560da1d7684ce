"""Which code an entry point names: another version of it is another network."""

from __future__ import annotations

import hashlib
import importlib.util
from importlib.metadata import packages_distributions, version
from pathlib import Path

from pipeline.errors import BundleError


def code_version(entry_point: str) -> dict[str, str]:
    """The distribution that has it, and its version; of a lone module the SHA-256 of its file.

    Raises BundleError where there is none.
    """
    module, _, _ = entry_point.partition(":")
    top = module.partition(".")[0]
    found = packages_distributions().get(top)
    if found:
        return {found[0]: version(found[0])}
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise BundleError(f"entry point {entry_point}: no module {module} is installed here")
    return {module: hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()[:16]}
