"""Is the code in a worker the code of the driver?"""

from __future__ import annotations

import hashlib
import importlib.util
from importlib.metadata import distributions, version
from pathlib import Path

PACKAGES = ("pipeline", "adapters", "workflows")


def software_digest() -> str:
    """SHA-256 over this program and every package that is installed: decoders come as plugins."""
    found = sorted(f"{d.name} {d.version}" for d in distributions())
    return hashlib.sha256("\n".join([package_digest(), *found]).encode()).hexdigest()


def package_digest() -> str:
    """SHA-256 over Python and C++ files of the three packages, as this process would import them.

    And over the versions of the libraries that compute: another torch is another program.
    """
    digest = hashlib.sha256()
    for library in ("torch", "numpy"):
        digest.update(f"{library} {version(library)}\0".encode())
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            digest.update(f"{name} missing".encode())
            continue
        root = Path(spec.origin).parent  # search locations may begin with that of extensions
        files = [path for path in root.rglob("*.*") if path.suffix in (".py", ".cpp", ".hpp")]
        for path in sorted(files):
            digest.update(f"{name}/{path.relative_to(root)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
