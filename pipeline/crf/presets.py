"""The energies that the DeepLab papers used, by name: weights, and deviations in px and 255ths."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pipeline.crf.checked import check_keys
from pipeline.errors import CrfError

PRESETS = MappingProxyType(
    {
        # name: smoothness weight, position; appearance weight, position, value
        "v1": (3, 3, 5, 50, 10),  # the release's SetupEnv and test.prototxt
        "v1-msc": (3, 3, 3, 95, 3),  # the same, multi-scale features
        "v2-vgg": (2, 2, 4, 65, 3),  # a reproduction's configuration
        "v2-resnet101": (3, 1, 4, 67, 3),  # the same
    }
)

OTHERS = {"engine", "iterations", "halo", "compatibility", "scope"}
"""What a ``crf`` part may say beside its kernels."""


def without_preset(crf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same ``crf`` part, its ``preset`` spelt out as two kernels over its bands.

    Raises CrfError for an unknown preset, or one that lacks bands or range.
    """
    if "preset" not in crf:
        return crf
    check_keys(
        crf,
        where="crf",
        required={"preset", "bands", "range"},
        optional=OTHERS,
    )
    name = crf["preset"]
    if not isinstance(name, str) or name not in PRESETS:
        raise CrfError(f"crf.preset: {name!r} asked; there are: {', '.join(PRESETS)}")
    smooth_weight, smooth_position, weight, position, value = PRESETS[name]
    return {
        **{key: crf[key] for key in OTHERS & crf.keys()},
        "smoothness": {"weight": smooth_weight, "position": smooth_position},
        "appearance": {
            "weight": weight,
            "position": position,
            "value": value,
            "bands": crf["bands"],
            "range": crf["range"],
        },
    }
