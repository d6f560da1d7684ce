"""The layouts by name."""

from __future__ import annotations

from types import MappingProxyType

from pipeline.errors import BundleError
from pipeline.models.layouts.jfzhang import Jfzhang
from pipeline.models.layouts.kazuto import Kazuto
from pipeline.models.layouts.layout import Layout
from pipeline.models.layouts.medicalnet_layout import MedicalNet
from pipeline.models.layouts.mmseg import Mmseg
from pipeline.models.layouts.smp import Smp
from pipeline.models.layouts.tensorflow_layout import Tensorflow
from pipeline.models.layouts.timm_layout import Timm
from pipeline.models.layouts.torchvision_layout import Torchvision
from pipeline.models.layouts.vainf import Vainf

LAYOUTS: MappingProxyType[str, Layout] = MappingProxyType(
    {
        "torchvision": Torchvision(),
        "kazuto": Kazuto(),
        "vainf": Vainf(),
        "jfzhang": Jfzhang(),
        "smp": Smp(),
        "mmseg": Mmseg(),
        "tf": Tensorflow(),
        "medicalnet": MedicalNet(),
        "timm": Timm(),
    }
)


def layout_named(name: str) -> Layout:
    """The layout of a name. Raises BundleError where there is none."""
    if name not in LAYOUTS:
        raise BundleError(f"--layout {name} asked; there are: {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
