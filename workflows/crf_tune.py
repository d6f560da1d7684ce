"""``crf tune``: weight and deviations of the appearance kernel, chosen on a validation set."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from adapters.mlflow_tracker import MlflowTracker, NoTracker
from adapters.uri import open_channels, open_source
from pipeline.crf.dense import Unrefined, refine_each
from pipeline.crf.engine import Device, engine_named, pick_engine
from pipeline.crf.params import CrfParams
from pipeline.crf.search import Candidate, SearchGrid, with_candidate
from pipeline.domain import ImageInfo, Region
from pipeline.errors import PlanError, SourceError
from pipeline.metrics import Confusion
from pipeline.models.bundle import Bundle, load_bundle, save_bundle
from pipeline.models.input_spec import Legend
from pipeline.ports import Block
from pipeline.stitching.given_scores import check_scores, given_probabilities
from pipeline.stitching.keep_core import to_labels
from workflows.config import tracking_uri
from workflows.crf_asked import read_crf_part
from workflows.interrupt import never
from workflows.legend import read_legend
from workflows.progress import RunProgress, stderr_console
from workflows.run_dir import read_json, write_json
from workflows.same_grid import check_same_grid
from workflows.workplace import usable_cores

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Example:
    """An image of the validation set, in memory."""

    info: ImageInfo
    block: Block
    """Valid where image, scores and reference are."""

    prob_KS: NDArray[np.float32]
    reference_S: NDArray[Any]

    def unrefined(self, params: CrfParams) -> Unrefined:
        """What a CRF takes of it. Raises CrfError."""
        info = self.info
        crf = params.resolve(info.spacing, unit=info.unit, channels=info.channels)
        origin = (0,) * info.ndim
        return Unrefined(prob_KS=self.prob_KS, block=self.block, origin=origin, params=crf)


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """What is searched, and where it is written down."""

    grid: SearchGrid
    device: str
    """auto, cpu or cuda."""

    into: Path | None
    """A bundle whose ``crf`` part becomes the best."""

    tracking: str | None
    experiment: str


def tune(
    examples: str | Path,
    output: str | Path,
    *,
    crf: str | Path,
    legend: str | Path | None,
    options: TuneOptions,
    stop: Callable[[], bool] = never,
) -> dict[str, Any]:
    """Search the grid, then half a step around its best; write the best as a CRF file.

    Args:
        examples: a CSV list with the columns image, scores, reference (paths relative to it).
            Whole images are held in memory.
        output: the YAML file to write.
        crf: where the search starts: its other kernels, bands and ranges are kept.
        legend: a YAML file with a list ``classes``; ids from 0 in the scores' order otherwise.
        options: grid, bundle, tracker.
        stop: asked between trials; True ends the search, and nothing is written.

    Returns:
        ``status``, the best setting, its mean IoU, and that of the scores alone.

    Raises:
        PipelineError: one line that says what was asked, what was found and what to do.
    """
    target, start = Path(output).absolute(), read_crf_part(Path(crf))
    _check_target(target, inputs=(Path(examples), Path(crf)))
    bundle = None if options.into is None else load_bundle(options.into)
    found, looks = read_examples(Path(examples), None if legend is None else Path(legend))
    search = _Search(start, found, looks, device=options.device)
    run = target.with_name(f"{target.name}.run")
    run.mkdir(parents=True, exist_ok=True)
    table, open_run = run / "trials.csv", run / "tracking.json"
    _close_killed(target, options, open_run)
    tracker = _tracker(target, options)
    params = {"crf": str(start), "images": str(len(found)), **search.ran_on}
    tracker.start(params=params, tags={"kind": "crf tune"})
    write_json(open_run, {"run_id": tracker.run_id})
    try:
        ended = search.run(options.grid, tracker=tracker, run=run, stop=stop)
        search.write_table(table)
        result = search.result() | {"status": "done" if ended else "interrupted"}
        if ended:
            search.compare()
            _keep(_plain(with_candidate(start, search.best)), target, bundle)
        artifacts = [table, *([target] if ended else [])]
        tracker.finish(result["status"], artifacts=artifacts)
    except BaseException:
        tracker.finish("failed", artifacts=())
        raise
    finally:
        open_run.unlink()
    return result | {"output": str(target) if ended else None, "mlflow_run_id": tracker.run_id}


def _device(asked: str, *, engine: str) -> Device:
    """A GPU where torch sees one and the engine runs there. Raises PlanError where it cannot be."""
    if asked not in ("auto", "cpu", "cuda"):
        raise PlanError(f"--device {asked} asked; there are: auto, cpu, cuda")
    anywhere = engine in ("auto", "torch")
    if asked == "cuda" and not anywhere:
        raise PlanError(f"--device cuda asked; the engine {engine} runs on the CPU: take torch")
    if asked == "cpu" or not anywhere:
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        raise PlanError("--device cuda: torch sees no CUDA device here; use --device cpu")
    return "cpu"


def _check_target(target: Path, *, inputs: Sequence[Path]) -> None:
    """Refuse what cannot be written, or would destroy something, in the end. Raises PlanError."""
    if target.is_dir():
        raise PlanError(f"output {target} is a directory; give the path of a file")
    if target.exists() and any(path.exists() and target.samefile(path) for path in inputs):
        raise PlanError(f"output {target} is an input of the search; choose another output")


def _tracker(
    target: Path, options: TuneOptions, run_id: str | None = None
) -> MlflowTracker | NoTracker:
    uri = tracking_uri(options.tracking, beside=target.parent)
    if uri == "none":
        return NoTracker()
    return MlflowTracker(uri, experiment=options.experiment, run_name=target.name, run_id=run_id)


def _close_killed(target: Path, options: TuneOptions, open_run: Path) -> None:
    """At the tracker, a search that was killed would be running for ever."""
    run_id = (read_json(open_run) or {}).get("run_id")
    if run_id is not None:
        killed = _tracker(target, options, run_id)
        killed.start(params={}, tags={})
        killed.finish("interrupted", artifacts=())


class _Search:
    """Trials, and what each came to."""

    def __init__(
        self, start: Mapping[str, Any], examples: list[Example], legend: Legend, *, device: str
    ) -> None:
        """Raises CrfError for a CRF that cannot be tuned, PlanError where nothing can be scored.

        ``device``: auto, cpu or cuda.
        """
        self._start, self._examples, self._legend = start, examples, legend
        self.trials: dict[Candidate, float] = {}
        self.without = self._mean_iou(example.prob_KS for example in examples)
        if math.isnan(self.without):
            raise PlanError(
                "no reference has a class at a pixel where image and scores are valid too: there"
                " is nothing to tune on"
            )
        params = self._params(Candidate(1, 1, 1))
        where = _device(device, engine=params.engine)
        name = pick_engine(params.engine, device=where)
        self._engine = engine_named(name, device=where, threads=usable_cores())
        self.ran_on = {"engine": name, "device": where}

    @property
    def best(self) -> Candidate:
        """The first of the best."""
        return max(self.trials, key=self.trials.__getitem__)

    def run(
        self,
        grid: SearchGrid,
        *,
        tracker: MlflowTracker | NoTracker,
        run: Path,
        stop: Callable[[], bool],
    ) -> bool:
        """Coarse, then fine; False where it was stopped."""
        coarse = grid.coarse()
        total = len(coarse) + len(grid.fine(coarse[0]))
        progress = RunProgress(
            "trials", total=total, done=0, file=run / "progress.json", console=stderr_console()
        )
        with progress:
            for step in (coarse, None):
                for candidate in step or grid.fine(self.best):
                    if stop():
                        return False
                    self.trials[candidate] = self._try(candidate)
                    metrics = {"mean_iou": self.trials[candidate], **candidate._asdict()}
                    tracker.metrics(metrics, step=len(self.trials))
                    progress.add()
        tracker.metrics({"best_mean_iou": self.trials[self.best]}, step=len(self.trials))
        return True

    def compare(self) -> None:
        """Say so where no setting is worth its time."""
        if (best := self.trials[self.best]) <= self.without:
            log.warning(
                "the best CRF comes to a mean IoU of %.4f, the scores alone to %.4f: --crf off is"
                " better on these images",
                best,
                self.without,
            )

    def result(self) -> dict[str, Any]:
        """The best so far, beside the scores alone."""
        values: dict[str, Any] = {"trials": len(self.trials), "mean_iou_without_crf": self.without}
        values |= self.ran_on
        if self.trials:
            values |= {**self.best._asdict(), "mean_iou": self.trials[self.best]}
        return values

    def write_table(self, path: Path) -> None:
        """Every trial, best first."""
        rows = sorted(self.trials.items(), key=lambda item: -item[1])
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*Candidate._fields, "mean_iou"])
            writer.writerows([*candidate, f"{score:.6f}"] for candidate, score in rows)

    def _params(self, candidate: Candidate) -> CrfParams:
        return CrfParams.from_mapping(with_candidate(self._start, candidate))

    def _try(self, candidate: Candidate) -> float:
        params = self._params(candidate)
        images = (example.unrefined(params) for example in self._examples)
        return self._mean_iou(refine_each(images, engine=self._engine))

    def _mean_iou(self, probs: Iterable[NDArray[np.float32]]) -> float:
        legend = self._legend
        confusion, values = Confusion(legend.values), np.array(legend.values, legend.dtype)
        for prob_KS, example in zip(probs, self._examples, strict=True):
            labels_S = to_labels(
                prob_KS, valid_S=example.block.valid_S, values=values, nodata=legend.nodata
            )
            confusion.add(labels_S, example.reference_S, ignore=legend.nodata)
        return confusion.scores().mean_iou


def read_examples(path: Path, classes: Path | None) -> tuple[list[Example], Legend]:
    """The images of a list, and their classes. Raises PlanError, SourceError or BundleError."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PlanError(f"the list {path} cannot be read: {error}") from error
    legends = {}
    examples = []
    for number, row in enumerate(rows, start=2):
        names = [(row.get(key) or "").strip() for key in ("image", "scores", "reference")]
        if not all(names):
            raise PlanError(
                f"the list {path}, line {number}: needs the columns image, scores and reference"
            )
        files = [path.parent / name for name in names]
        scores = open_channels(str(files[1])).info
        check_scores(scores, name=str(files[1]))
        legend = read_legend(classes, scores.channels)
        legends[legend.values] = legend
        examples.append(_example(*files, legend=legend))
    if len(legends) != 1:
        raise PlanError(f"the list {path}: images of one set of classes are needed: {[*legends]}")
    return examples, next(iter(legends.values()))


def _example(image: Path, scores: Path, reference: Path, *, legend: Legend) -> Example:
    guide, given, truth = (
        open_channels(str(image)),
        open_channels(str(scores)),
        open_source(str(reference)),
    )
    info, whole = guide.info, Region.whole(guide.info.shape)
    for other, path in ((given.info, scores), (truth.info, reference)):
        check_same_grid(info, other, names=f"{image} and {path}")
    block, known = guide.read(whole), truth.read(whole)
    prob_KS, scored_S = given_probabilities(given.read(whole))
    if known.image_CS.shape[0] != 1:
        raise SourceError(f"{reference} has {len(known.image_CS)} bands: a mask of labels has one")
    reference_S = np.where(known.valid_S, known.image_CS[0], legend.nodata)
    if (reference_S != reference_S.astype(legend.dtype)).any():
        raise SourceError(f"{reference} holds values beyond {legend.dtype}: labels are needed")
    return Example(
        info=info,
        block=Block(block.image_CS, block.valid_S & scored_S),
        prob_KS=prob_KS,
        reference_S=reference_S.astype(legend.dtype),
    )


def _keep(crf: Mapping[str, Any], target: Path, bundle: Bundle | None) -> None:
    """Write the file, and the bundle anew where there is one. Raises BundleError."""
    draft = target.with_name(f".{target.name}.tmp")
    draft.write_text(yaml.safe_dump({"crf": crf}, sort_keys=False))
    draft.replace(target)
    if bundle is not None:
        save_bundle(bundle.path, replace(bundle, crf=crf), bundle.weights_file.read_bytes())


def _plain(value: Any) -> Any:
    """Lists and dictionaries, as YAML writes them."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value
