"""Classes of the data sets that published weights were trained on."""

from __future__ import annotations

from types import MappingProxyType

_VOC = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse"
    " motorbike person pottedplant sheep sofa train tvmonitor"
)
_CITYSCAPES = (
    "road sidewalk building wall fence pole traffic-light traffic-sign vegetation terrain sky"
    " person rider car truck bus train motorcycle bicycle"
)

KNOWN_CLASSES = MappingProxyType(
    {
        len(names): (data, names)
        for data, names in (
            ("PASCAL VOC 2012", tuple(_VOC.split())),
            ("Cityscapes", tuple(_CITYSCAPES.split())),
        )
    }
)
"""Data set and class names, by their number: 21 or 19."""
