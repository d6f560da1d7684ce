"""What will run, as it was decided: every value that the run depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.crf.density import Density
from pipeline.crf.params import ResolvedCrf
from pipeline.domain import Pass, SamplePass, Shape, TilePlan
from pipeline.inference.average import Average
from workflows.costs import Costs
from workflows.plan_json import halo_json, windows_json, windows_words
from workflows.resolved import Resolved
from workflows.scene_plan import ScenePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentPlan:
    """Everything that is known before the first tile is read."""

    tiles: TilePlan
    resolved: Resolved
    request_digest: str
    """SHA-256 of source, bundle and options as asked: does a command mean this run?"""

    source_digest: str
    channels: tuple[int, ...]
    crf: ResolvedCrf | None
    """Of each tile with its halo; None for none, and where one lattice lies under all tiles."""

    density: Density | None
    """Of the image, as the CRF sees it: memory follows it. None without a CRF."""

    scene: ScenePlan | None
    """The rounds under one lattice; None without one."""

    average: Average
    """How the network sees the scene."""

    network_exact: bool
    """True when the halo covers the receptive field and pooling does not depend on the tile."""

    receptive_field: Shape | None
    """Of a coarse logit, in pixels; image pooling left out. None: the scene."""

    stages: int
    """That the network was taken apart into; 1 for one that runs as one."""

    costs: Costs
    workers: int

    aoi: Mapping[str, Any] | None
    """Where the area was read that alone gets labels, and its digest; None for all of the scene."""

    asked: Mapping[str, Any]
    """Where source and bundle lie, and the options: what ``certify`` needs to find them again."""

    notes: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """True when labels do not depend on the tile either: a CRF sees no more than one."""
        return self.network_exact and self.crf is None

    @property
    def last(self) -> Pass:
        """The pass that writes the mask."""
        return self.sweep if self.scene is None else self.scene.rounds[-1]

    @property
    def sweep(self) -> Pass:
        """The network's pass, which writes the mask but where a lattice lies under all tiles."""
        return next(p for p in self.tiles.passes if isinstance(p, Pass) and p.name == "segment")

    @property
    def samples(self) -> SamplePass:
        """The pass that computes samples again, for the certificate."""
        return next(p for p in self.tiles.passes if isinstance(p, SamplePass))

    @property
    def summary(self) -> str:
        """One line for people, before the run."""
        sweep, resolved = self.sweep, self.resolved
        crf = f"CRF {f'by {self.crf.engine}' if self.crf else 'off'}"
        side = " x ".join(map(str, sweep.grid.tile))
        tiles = f"{len(sweep)} of {len(sweep.grid)} tiles" if self.aoi else f"{len(sweep)} tiles"
        return (
            f"{tiles} of {side} px, halo {sweep.reach.halo_with_window.largest} px,"
            f" work {self.costs.halo_work_ratio:.2f} times that of one pass, {windows_words(self)},"
            f" {resolved.precision.name} on {resolved.device} ({resolved.precision.why}),"
            f"{f' mean of {resolved.average},' if resolved.average != 'none' else ''}"
            f" {self.scene.summary if self.scene else crf}"
        )

    def as_json(self) -> dict[str, Any]:
        """What plan.json holds and ``terravox plan --json`` prints."""
        sweep, crf = self.sweep, self.scene.crf.params if self.scene else self.crf
        return {
            "fingerprint": self.tiles.fingerprint,
            "request_digest": self.request_digest,
            "source_digest": self.source_digest,
            "resolved": asdict(self.resolved),
            "case": sweep.case,
            "shape": sweep.grid.shape,
            "padded_shape": sweep.grid.padded_shape,
            "output_stride": self.resolved.output_stride,
            "tile_stride": sweep.grid.stride,
            "tile": sweep.grid.tile,
            "tiles": len(sweep),
            "tiles_outside": len(sweep.grid) - len(sweep),
            "aoi": self.aoi,
            "stages": self.stages,
            "halo": halo_json(sweep.reach),
            "crf_halo": sweep.crf_halo.before,
            "exact": self.exact,
            "receptive_field": self.receptive_field,
            **self.costs.as_json(),
            "workers": self.workers,
            "windows": windows_json(self),
            "peak_memory_bytes": self.tiles.peak_bytes,
            "store_bytes": self.tiles.store_bytes,
            "crf": crf.as_json() if crf else None,
            "crf_density": self.density.as_json() if self.density else None,
            "lattice": self.scene.as_json() if self.scene else None,
            "channels": self.channels,
            "samples": [asdict(sample) for sample in self.samples.samples],
            "asked": self.asked,
            "notes": self.notes,
        }
