"""The run directory: its files by name, and the rule that a half-written one has no final name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import PlanError, StoreError

PLAN_KEYS = ("fingerprint", "request_digest", "resolved", "tiles", "samples", "asked")
"""What a later command reads in plan.json."""


@dataclass(frozen=True, slots=True)
class RunDir:
    """``OUT.run/``: plan, ledger, stores, progress, report and, last, the manifest."""

    path: Path

    @property
    def plan(self) -> Path:
        """What was decided before the run."""
        return self.path / "plan.json"

    @property
    def ledger(self) -> Path:
        """Directory of ledger segments."""
        return self.path / "ledger"

    @property
    def mask(self) -> Path:
        """Zarr store of class ids."""
        return self.path / "mask.zarr"

    @property
    def scores(self) -> Path:
        """Zarr store of probabilities, when asked for."""
        return self.path / "scores.zarr"

    @property
    def samples(self) -> Path:
        """What tiles and the whole network say in a few small places."""
        return self.path / "samples"

    @property
    def certificate(self) -> Path:
        """How far the two lie apart."""
        return self.path / "certificate.json"

    @property
    def sums(self) -> Path:
        """Zarr store of a context pass: sums of features, when the scene's mean is asked for."""
        return self.path / "context.zarr"

    @property
    def lattice(self) -> Path:
        """What tiles under one lattice told one another; deleted when the run is done."""
        return self.path / "lattice"

    @property
    def progress(self) -> Path:
        """How far the run is; rewritten about once a second."""
        return self.path / "progress.json"

    @property
    def tracking(self) -> Path:
        """Identifier of the tracker's run, so that a resumed run goes on in it."""
        return self.path / "tracking.json"

    @property
    def report(self) -> Path:
        """The page for people."""
        return self.path / "report.html"

    @property
    def manifest(self) -> Path:
        """Written last: its presence means that the product exists."""
        return self.path / "manifest.json"

    @property
    def scratch(self) -> Path:
        """Intermediate files, deleted when the run is done."""
        return self.path / "scratch"

    @property
    def parts(self) -> tuple[Path, ...]:
        """All that a run makes here, the lease apart."""
        files = (self.plan, self.progress, self.tracking, self.report, self.manifest)
        folders = (self.ledger, self.mask, self.scores, self.sums, self.samples, self.lattice)
        return (*folders, self.scratch, *files, self.certificate, self.path / "finishing.json")

    @property
    def cases(self) -> Path:
        """Of a batch: a run directory for each case."""
        return self.path / "cases"

    def check_ours(self, *, batch: bool) -> None:
        """Refuse a directory that holds something else than a run of this kind. Raises PlanError.

        Args:
            batch: whether it is a batch's or one image's.
        """
        other = self.plan if batch else self.cases
        if other.exists():
            kind = "one image" if batch else "a batch"
            raise PlanError(f"--run-dir {self.path} is that of {kind}: name another directory")
        if not self.path.is_dir() or (self.path / "lease.lock").exists() or self.plan.exists():
            return
        found = sorted(entry.name for entry in self.path.iterdir())
        if found:
            raise PlanError(
                f"--run-dir {self.path} is not a run's: it holds {found[0]};"
                " name a directory that is empty or does not exist"
            )

    def sweep(self) -> None:
        """Delete what killed drivers leave: proofs of shared storage, half-written drafts."""
        for pattern in ("nonce-*", "lease-*.tmp", ".*.tmp"):
            for path in self.path.glob(pattern):
                path.unlink(missing_ok=True)

    def withdraw(self) -> None:
        """Delete what was unpacked for a request that runs nothing, but of no run begun earlier.

        For who holds the lease.
        """
        if not self.plan.exists() or self.manifest.exists():
            shutil.rmtree(self.scratch, ignore_errors=True)

    def clear(self) -> None:
        """Delete what runs make here, and nothing that somebody else put here: ``--fresh``.

        But for what is unpacked: it lies under the name of what it is made of, and may be in use.
        """
        for part in self.parts:
            if part == self.scratch:
                continue
            shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)


def read_plan(run: RunDir) -> dict[str, Any] | None:
    """What plan.json holds; None where there is none. Raises PlanError when damaged."""
    plan = read_json(run.plan)
    lacking = [key for key in PLAN_KEYS if plan is not None and key not in plan]
    if lacking:
        raise PlanError(
            f"{run.plan} is damaged, or of another version: it has no {lacking[0]}; start over with"
            " --fresh"
        )
    return plan


def keep_plan(run: RunDir, plan: Mapping[str, Any], *, of: str) -> None:
    """Write plan.json, or prove that the one that is there is this run's.

    ``of``: what a plan is made of, in words. Raises PlanError where the two differ.
    """
    found = read_plan(run)
    if found is None:
        run.path.mkdir(parents=True, exist_ok=True)
        write_json(run.plan, plan)
    elif found["fingerprint"] != plan["fingerprint"]:
        raise PlanError(
            f"{run.path} holds another run ({of} differ):"
            " choose another --run-dir, or add --fresh to start over"
        )


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file. Raises PlanError when damaged."""
    try:
        values = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise PlanError(f"{path} is not JSON ({error}); start over with --fresh") from error
    if not isinstance(values, dict):
        raise PlanError(f"{path} does not hold an object; start over with --fresh")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write whole or not at all. Raises StoreError."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        with draft.open("w") as file:
            json.dump(values, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise StoreError(
            f"{path} could not be written: {error}; free the disk and run the same command again"
        ) from error


def canonical_digest(values: Mapping[str, Any]) -> str:
    """SHA-256 of an object's canonical JSON."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
