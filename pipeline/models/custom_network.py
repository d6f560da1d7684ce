"""Somebody's own network, ready to run: an entry point with weights, or an exported program.

Both are code. An entry point runs what is installed under its name; a program is an operator graph
that torch reads with its own means, unpickling and evaluating expressions among them. A bundle of
this family is trusted as a package is that one installs; its checksum says that it is unchanged.

Axes in array names: B batch, C channel, K class, S space, (y, x) or (z, y, x).
"""

from __future__ import annotations

import importlib
import inspect
import io
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from pipeline.domain import Shape
from pipeline.errors import BundleError
from pipeline.models.custom_architecture import CustomArchitecture
from pipeline.models.frame import Frame
from pipeline.models.resize import Resize

_SMALLEST_PX = 16
"""Side of what a network is tried on; two strides where that is more."""


class CustomNetwork(nn.Module):
    """A network that runs as one: how it computes is not known, only what."""

    align_corners = False
    pool = None

    def __init__(
        self, module: nn.Module, architecture: CustomArchitecture, *, bands: int, classes: int
    ) -> None:
        """Take ``module``, in eval mode, after a trial on a small image.

        Raises:
            BundleError: it does not take such an image, gives something else than logits of all
                classes at one whole part of its size, or other ones the second time.
        """
        super().__init__()
        self.module = module.eval()
        self.architecture, self.bands, self.classes = architecture, bands, classes
        self.stride = architecture.output_stride
        self.upsample = Resize.by(_scale(self), architecture.dims, align_corners=False)

    def forward(self, image_BCS: Tensor, frame: Frame) -> Tensor:
        """Return (B, K, *S) logits at the input's size, which are multiples of the stride."""
        logits_BKS: Tensor = self.upsample(self.coarse_logits(image_BCS, frame))
        return logits_BKS

    def coarse_logits(self, image_BCS: Tensor, frame: Frame) -> Tensor:
        """Return (B, K, *S / n) logits at the network's own last resolution."""
        logits_BKS: Tensor = self.module(image_BCS)
        return logits_BKS

    def pool_over(self, crop: Sequence[int] | None) -> Self:
        """Nothing: there is no window to set."""
        return self


def custom_network(
    architecture: CustomArchitecture, data: bytes, *, bands: int, classes: int
) -> CustomNetwork:
    """The network of a bundle, whose file of weights holds ``data``.

    Raises:
        BundleError: the entry point makes no network, the program takes no image of any size, or
            either is none that can run here.
        RuntimeError, SafetensorError: the weights are not those of the entry point's network.
    """
    if architecture.entry_point is None:
        module = network_of_program(data, dims=architecture.dims)
    else:
        module = network_of_entry_point(architecture.entry_point, architecture.arguments)
        module.load_state_dict(safetensors.torch.load(data))
    return CustomNetwork(module, architecture, bands=bands, classes=classes)


def network_of_entry_point(entry_point: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A network with fresh weights; what it draws of random numbers is taken from nobody else.

    Raises BundleError where the factory is not there, makes no networks, or does not make this one.
    """
    factory = _factory(entry_point)
    try:
        with torch.random.fork_rng(devices=()):
            return factory(**arguments)
    except Exception as error:  # somebody's own code: it may raise anything
        raise BundleError(
            f"{entry_point} with the arguments {arguments}: {problem_of(error)}"
        ) from error


def network_of_program(data: bytes, *, dims: int) -> nn.Module:
    """A program as ``torch.export.save`` wrote it, its layers under the names they had.

    Raises:
        BundleError: it is none, or does not take one image of any size: the spatial axes must have
            been exported as dynamic, each by itself (``dynamic_shapes`` with ``torch.export.Dim``,
            for a stride of 32 px ``32 * Dim("rows")``).
    """
    try:
        program = torch.export.load(io.BytesIO(data))
    except (RuntimeError, ValueError, KeyError, AssertionError, OSError) as error:
        problem = " ".join(str(error).split())[:200]
        raise BundleError(f"not a program of torch.export.save: {problem}") from error
    _check_sizes(program, dims=dims)
    return torch.export.unflatten(program)


def problem_of(error: Exception) -> str:
    """What somebody's code complained of, in one line; the kind of error where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _factory(entry_point: str) -> Callable[..., nn.Module]:
    """What an entry point names, if it makes networks: nothing else is called.

    Raises BundleError.
    """
    name, _, attributes = entry_point.partition(":")
    try:
        found: Any = importlib.import_module(name)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except Exception as error:  # an import runs somebody's own code
        raise BundleError(
            f"entry point {entry_point}: {problem_of(error)}; install what has it, wherever tiles"
            " are computed"
        ) from error
    made = found if inspect.isclass(found) else _returned(found)
    if not (inspect.isclass(made) and issubclass(made, nn.Module)):
        raise BundleError(
            f"entry point {entry_point} is neither a class of networks nor a function that is"
            " annotated to return one (-> torch.nn.Module)"
        )
    factory: Callable[..., nn.Module] = found
    return factory


def _returned(found: Any) -> Any:
    """What a function is annotated to return; None where nothing is said."""
    try:
        return typing.get_type_hints(found).get("return")
    except (TypeError, NameError):
        return None


def _check_sizes(program: ExportedProgram, *, dims: int) -> None:
    """Raise BundleError unless it takes one image of any size and gives one tensor."""
    takes, gives = program.graph_signature.user_inputs, program.graph_signature.user_outputs
    if len(takes) != 1 or len(gives) != 1:
        raise BundleError(
            f"the program takes {len(takes)} inputs and gives {len(gives)} outputs, not one image"
            " and one tensor of logits: export a module that wraps it"
        )
    image = next(node for node in program.graph.nodes if node.name == takes[0])
    shape = image.meta["val"].shape
    if len(shape) != dims + 2:
        raise BundleError(
            f"the program takes {len(shape)} axes, its {dims}-D images have {dims + 2}"
        )
    sizes = [set() if isinstance(n, int) else n.node.expr.free_symbols for n in shape[2:]]
    if not all(sizes) or len(set[Any]().union(*sizes)) < dims:
        found = " x ".join(map(str, shape[2:]))
        raise BundleError(
            f"the program takes images of {found} px alone, not of any size: export it with"
            " dynamic_shapes that give each spatial axis a torch.export.Dim of its own"
        )


def _scale(network: CustomNetwork) -> int:
    """By how much the logits are smaller than the image. Raises BundleError."""
    stride = network.stride
    size = (max(2, -(-_SMALLEST_PX // stride)) * stride,) * network.architecture.dims
    first_BKS, second_BKS = _tried(network, size), _tried(network, size)
    scale = size[0] // max(1, first_BKS.shape[2])
    if tuple(side * scale for side in first_BKS.shape[2:]) != size or stride % max(1, scale):
        raise BundleError(
            f"an image of {size} px gives logits of {tuple(first_BKS.shape[2:])}, not of the same"
            f" size or a whole part of it that divides the output stride of {stride} px"
        )
    if first_BKS.shape[1] != network.classes:
        raise BundleError(
            f"the network gives {first_BKS.shape[1]} channels, the bundle has {network.classes}"
            " classes"
        )
    if not torch.equal(first_BKS, second_BKS):
        raise BundleError(
            "the network gives other logits for the same image the second time: export it in eval"
            " mode, and take randomness out"
        )
    return scale


def _tried(network: CustomNetwork, size: Shape) -> Tensor:
    """What it gives for a plain image of ``size`` px, one tensor of as many axes."""
    ramp = torch.linspace(-1, 1, network.bands * math.prod(size))
    image_BCS = ramp.reshape(1, network.bands, *size)
    try:
        with torch.inference_mode():
            found: object = network.module(image_BCS)
    except Exception as error:  # somebody's own code: it may raise anything
        raise BundleError(
            f"the network does not take an image of {network.bands} bands and {size} px:"
            f" {problem_of(error)}"
        ) from error
    if not isinstance(found, Tensor) or found.ndim != image_BCS.ndim or len(found) != 1:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise BundleError(
            f"the network must give one tensor of {image_BCS.ndim} axes for one image, found"
            f" {shape}: wrap it so that it does"
        )
    return found
