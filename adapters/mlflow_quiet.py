"""MLflow without chatter, telemetry and long waits."""

from __future__ import annotations

import logging
import os
from typing import Any

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a segmentation of patients reports to no third party
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # MLflow's seven stall a run for minutes
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""Read by MLflow when it is imported; what the user has set stays."""


def import_mlflow() -> Any:
    """The package, hushed."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in ("mlflow", "alembic"):  # its import sets their levels
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow
