"""An archive and how a batch is run over it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from batches import OPTIONS, write_archive

from workflows.batching import batch


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_archive(tmp_path / "in")


@pytest.fixture
def run(slim: Path, slim3d: Path) -> Callable[..., dict[str, Any]]:
    def go(sources: Any, output: Path, **changes: Any) -> dict[str, Any]:
        asked = sources if isinstance(sources, list) else [sources]
        models = changes.pop("models", [slim, slim3d])
        options = OPTIONS.model_copy(update=changes)
        return batch(asked, output, models=models, options=options)

    return go
