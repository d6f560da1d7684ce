"""Networks that somebody brings: an entry point of a bundle names them."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from pipeline.models.bundle import (
    Bundle,
    ClassInfo,
    CustomArchitecture,
    InputSpec,
    Scaling,
    save_bundle,
)


class Hourglass(nn.Module):
    """Two halvings and back, by a transposed convolution and by resizing, with a skip."""

    def __init__(self, bands: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(bands, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=3, dilation=3)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.last = nn.Conv2d(16, classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.silu(self.first(x))
        x = F.max_pool2d(F.gelu(self.norm(self.down(skip))), 2)
        x = F.interpolate(self.deep(x), scale_factor=2.0, mode="nearest")
        return self.last(torch.cat([self.up(x), skip], dim=1))


class Coarse(nn.Sequential):
    """Logits at a quarter of the size."""

    def __init__(self, bands: int, classes: int, dims: int = 2) -> None:
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        super().__init__(
            conv(bands, 8, 3, stride=2, padding=1), nn.ELU(), conv(8, classes, 3, 2, padding=1)
        )


class Squeeze(nn.Module):
    """A gate for each channel, from its mean over all places."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))


class Squeezed(nn.Module):
    """Two convolutions, and between them what no halo helps against."""

    def __init__(self, bands: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(bands, 8, 3, padding=1)
        self.gate = Squeeze(8)
        self.last = nn.Conv2d(8, classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gate(torch.relu(self.first(x))))


def hourglass(bands: int, classes: int) -> nn.Module:
    """A factory that says what it makes."""
    return Hourglass(bands, classes)


def picky(bands: int, classes: int) -> nn.Module:
    """A factory that checks what it is given as many do."""
    assert bands == classes
    return Hourglass(bands, classes)


def says_nothing(bands: int, classes: int):
    """A factory that does not."""
    return Hourglass(bands, classes)


def chatty() -> nn.Module:
    """A factory that prints."""
    print("a network that talks")
    return nn.Conv2d(3, 4, 1)


def exported(network: nn.Module, *, stride: int) -> bytes:
    """A program for images of any size, as a user would write it."""
    sizes = {2: stride * Dim("rows", min=2), 3: stride * Dim("columns", min=2)}
    image_BCS = torch.zeros(1, 3, 8 * stride, 12 * stride)
    program = torch.export.export(network.eval(), (image_BCS,), dynamic_shapes=(sizes,))
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def own_bundle(
    path: Path, network: nn.Module | bytes, *, stride: int, entry_point: str | None = None,
    dims: int = 2, bands: int = 3, arguments: dict[str, object] | None = None,
) -> Bundle:  # fmt: skip
    """A bundle of ``network``, or of an exported program, for the images that tests make."""
    bundle = Bundle(
        name="own",
        version=1,
        architecture=CustomArchitecture(
            family="custom",
            dims=dims,
            output_stride=stride,
            entry_point=entry_point,
            arguments=arguments or {},
        ),
        classes=tuple(ClassInfo(id=n, name=f"c{n}", color="#000000") for n in range(4)),
        ignore_index=255,
        input=InputSpec(
            bands=bands,
            dtype="float32",
            scaling=Scaling(type="z-score", mean=(1000.0,), std=(300.0,)),
        ),
        crop=(64,) * dims,
    )
    weights = network if isinstance(network, bytes) else network.state_dict()
    return save_bundle(path, bundle, weights)
