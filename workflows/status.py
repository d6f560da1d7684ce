"""``status``: how far a run is, read from its directory alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from adapters.lease_file import read_holder
from adapters.ledger_file import LedgerFile
from pipeline.errors import PlanError
from workflows.run_dir import RunDir, read_json, read_plan


def run_status(path: Path) -> dict[str, Any]:
    """State, tiles and owner. Raises PlanError for a directory that holds no run."""
    run = RunDir(path)
    plan, manifest = read_plan(run), read_json(run.manifest)
    if plan is None:
        raise PlanError(f"{path} holds no run: it has no plan.json; give an OUT.run")
    records = LedgerFile(run.ledger, owner="status").records()
    tiles = Counter(record.status for record in records.values())
    holder = read_holder(run.path / "lease.json")
    alive = holder is not None and holder.alive
    state = manifest["status"] if manifest else "running" if alive else "stopped"
    progress = read_json(run.progress) or {}
    return {
        "state": state,
        "tiles_done": tiles["done"],
        "tiles_failed": tiles["failed"],
        "tiles_total": plan["tiles"],
        "tiles_per_s": progress.get("tiles_per_s") if alive else None,
        "seconds_left": progress.get("seconds_left") if alive else None,
        "owner": f"process {holder.pid} on {holder.host}" if holder and alive else None,
        "fingerprint": plan["fingerprint"],
        "output": manifest["output"] if manifest else None,
    }
