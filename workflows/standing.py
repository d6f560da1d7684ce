"""``status``: how far a run or a batch is, read from its directory alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, get_args

from adapters.lease_file import read_holder
from adapters.ledger_file import CaseLedgerFile, LedgerFile
from pipeline.domain import CaseState
from pipeline.errors import PlanError
from workflows.run_dir import RunDir, read_json, read_plan


def status(run_dir: str | Path) -> dict[str, Any]:
    """State, progress and owner. Raises PlanError for a directory that holds no run."""
    run = RunDir(Path(run_dir))
    if not run.path.is_dir():
        raise PlanError(f"{run_dir} holds no run: it has no plan.json; give an OUT.run")
    holder = read_holder(run.path / "lease.json")
    alive = holder is not None and holder.alive
    owner = f"process {holder.pid} on {holder.host}" if holder and alive else None
    progress = (read_json(run.progress) or {}) if alive else {}
    left = {"seconds_left": progress.get("seconds_left"), "owner": owner}
    plan = read_plan(run)
    if plan is None and run.ledger.is_dir():
        return _batch(run, alive=alive) | {"cases_per_s": progress.get("cases_per_s")} | left
    if plan is None:
        raise PlanError(f"{run_dir} holds no run: it has no plan.json; give an OUT.run")
    rate = {"tiles_per_s": progress.get("tiles_per_s")}
    return _image(run, plan, alive=alive) | rate | left


def _image(run: RunDir, plan: dict[str, Any], *, alive: bool) -> dict[str, Any]:
    manifest = read_json(run.manifest)
    records = LedgerFile(run.ledger, owner="status").records()
    # Under one lattice the mask is written in the last of many rounds.
    rounds = (plan.get("lattice") or {}).get("rounds", ["segment"])
    settled = Counter(key.stage for key in records)
    tiles = Counter(r.status for key, r in records.items() if key.stage == rounds[-1])
    ended = sum(settled[name] == plan["tiles"] for name in rounds)
    turns = {"rounds_done": ended, "rounds_total": len(rounds)} if len(rounds) > 1 else {}
    return {
        "state": manifest["status"] if manifest else "running" if alive else "stopped",
        "tiles_done": tiles["done"],
        "tiles_failed": tiles["failed"],
        "tiles_total": plan["tiles"],
        **turns,
        "fingerprint": plan["fingerprint"],
        "output": manifest["output"] if manifest else None,
    }


def _batch(run: RunDir, *, alive: bool) -> dict[str, Any]:
    records = CaseLedgerFile(run.ledger, owner="status").records()
    cases = Counter(record.state for record in records.values())
    stopped = cases["queued"] + cases["running"]
    bad = cases["failed"] + cases["quarantined"]
    settled = "stopped" if stopped else "partial" if bad else "done"
    return {
        "state": "running" if alive else settled,
        **{f"cases_{state}": cases[state] for state in get_args(CaseState)},
        "running": ", ".join(r.case for r in records.values() if r.state == "running"),
    }
