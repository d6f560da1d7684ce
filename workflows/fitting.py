"""Does an image fit a network: bands, kind of scan, pixel size."""

from __future__ import annotations

from pipeline.domain import ImageInfo
from pipeline.errors import PlanError, SourceError
from pipeline.models.bundle import Bundle

SPACING_TOLERANCE = 0.05


def match_channels(info: ImageInfo, bundle: Bundle) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Index in the image of each band of the network, and notes on how they were matched.

    By name, in any case, where the image has all of the names; by position where it has none of
    them, which needs equal counts. Raises SourceError, also for an image that has some of them.
    """
    names = None if isinstance(bundle.input.bands, int) else bundle.input.bands
    wanted_names = [name.casefold() for name in names or ()]
    found_names = [name.casefold() for name in info.channels]
    missing = [name for name in wanted_names if name not in found_names]
    if names is not None and not missing:
        return tuple(found_names.index(name) for name in wanted_names), ()
    if len(missing) < len(wanted_names):
        raise SourceError(
            f"the network of {bundle.name} takes bands {', '.join(names or ())}, the image has"
            f" {', '.join(info.channels)}: no {', '.join(missing)}; add or name these bands"
        )
    count = bundle.input.band_count
    if len(info.channels) != count:
        wanted = f"{count} ({', '.join(names)})" if names else str(count)
        raise SourceError(
            f"the network of {bundle.name} takes {wanted} bands, the image has"
            f" {len(info.channels)} ({', '.join(info.channels)}): give an image with these bands"
        )
    if names is None:
        return tuple(range(count)), ()
    note = f"bands taken by position: {', '.join(info.channels)} as {', '.join(names)}"
    return tuple(range(count)), (note,)


def check_modality(info: ImageInfo, bundle: Bundle) -> None:
    """Raise SourceError for another kind of scan than the network's, where both are known."""
    wanted, found = bundle.input.modality, info.modality
    if wanted and found and wanted != found:
        raise SourceError(
            f"the scan is {found}, the network of {bundle.name} was trained on {wanted}:"
            " choose another scan or bundle"
        )


def check_spacing(info: ImageInfo, bundle: Bundle, *, any_resolution: bool) -> tuple[str, ...]:
    """Notes on the pixel size. Raises PlanError when it is more than 5 % off the bundle's."""
    if info.unit == "mm":
        wanted = bundle.input.spacing_mm
    else:
        size = bundle.input.pixel_size_m
        wanted = (size,) * info.ndim if size else None
    if wanted is None:
        return ()
    if info.unit == "px":
        return (f"the image has no physical pixel size; the network expects {wanted[0]:g} m",)
    off = max(abs(a / b - 1) for a, b in zip(info.spacing, wanted, strict=True))
    if off <= SPACING_TOLERANCE:
        return ()
    found = " x ".join(f"{s:g}" for s in info.spacing)
    asked = " x ".join(f"{s:g}" for s in wanted)
    text = f"pixel size is {found} {info.unit}, the network was trained at {asked} {info.unit}"
    if not any_resolution:
        raise PlanError(f"{text}: resample the image, or add --any-resolution")
    return (text,)
