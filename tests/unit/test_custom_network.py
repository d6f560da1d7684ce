"""Networks that somebody brings: what is taken, what is refused, and what is foretold of them."""

from __future__ import annotations

import io
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from own_networks import Coarse, Hourglass, Squeezed, exported, own_bundle
from torch import Tensor, nn
from torch.export import Dim

from pipeline.domain import Halo, Reach
from pipeline.errors import BundleError
from pipeline.inference.whole_cost import trial_of
from pipeline.models.bundle import Bundle, CustomArchitecture, load_bundle, save_bundle
from pipeline.models.custom_bundle import save_custom
from pipeline.models.custom_code import code_version
from pipeline.models.custom_network import CustomNetwork
from pipeline.models.custom_reach import custom_reach, known_probe, probe_custom
from pipeline.models.frame import Frame
from workflows.model import probe_bundle

SIZES = {"bands": 3, "classes": 4}


def wrapped(module: nn.Module, *, stride: int, dims: int = 2) -> CustomNetwork:
    architecture = CustomArchitecture(
        family="custom", dims=dims, output_stride=stride, entry_point="own_networks:Hourglass"
    )
    return CustomNetwork(module, architecture, bands=3, classes=4).eval()


def by_entry_point(path: Path, entry_point: str, **arguments: object) -> Bundle:
    network = Hourglass(3, 4)
    return own_bundle(path, network, stride=4, entry_point=entry_point, arguments=arguments)


def logits(bundle: Bundle, image_BCS: Tensor) -> Tensor:
    size = tuple(image_BCS.shape[2:])
    with torch.inference_mode():
        return bundle.network()(image_BCS, Frame((0,) * len(size), size))


def test_an_entry_point_comes_back_with_its_weights(tmp_path: Path) -> None:
    """The factory's fresh weights would be used, or batch norm would run in training mode."""
    network = Hourglass(3, 4)
    network.norm.running_mean.fill_(0.3)
    own_bundle(tmp_path / "b", network, stride=4, entry_point="own_networks:hourglass",
               arguments=SIZES)  # fmt: skip
    image_BCS = torch.randn(1, 3, 32, 40)
    read = load_bundle(tmp_path / "b")
    with torch.inference_mode():
        assert torch.equal(logits(read, image_BCS), network.eval()(image_BCS))
    assert isinstance(read.architecture, CustomArchitecture)
    assert read.architecture.arguments == SIZES


def test_making_a_network_takes_nobodys_random_numbers(tmp_path: Path) -> None:
    """The crops of a training would change with the bundles that were opened before."""
    bundle = by_entry_point(tmp_path / "b", "own_networks:Hourglass", **SIZES)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    bundle.network()
    assert torch.equal(torch.rand(3), wanted)


def test_a_program_comes_back_and_takes_any_size(tmp_path: Path) -> None:
    """A program runs at the size it was exported at, or its file is not that of the bundle."""
    network = Hourglass(3, 4).eval()
    own_bundle(tmp_path / "b", exported(network, stride=4), stride=4)
    read = load_bundle(tmp_path / "b")
    assert [p.name for p in sorted(read.path.iterdir())] == ["model.yaml", "program.pt2"]
    for size in ((48, 64), (20, 100)):
        image_BCS = torch.randn(1, 3, *size)
        with torch.inference_mode():
            assert torch.allclose(logits(read, image_BCS), network(image_BCS), atol=1e-6)


def test_a_program_that_was_changed_is_not_run(tmp_path: Path) -> None:
    """What torch reads there may run code: only the file that the bundle means is opened."""
    bundle = own_bundle(tmp_path / "b", exported(Hourglass(3, 4), stride=4), stride=4)
    bundle.weights_file.write_bytes(bundle.weights_file.read_bytes() + b"x")
    with pytest.raises(BundleError, match=r"program\.pt2 has SHA-256"):
        bundle.network()


@pytest.mark.parametrize("sizes", [None, ({2: 4 * Dim("rows")},), ({2: Dim("n"), 3: Dim("n")},)])
def test_a_program_of_one_size_or_one_shape_is_refused(tmp_path: Path, sizes: object) -> None:
    """It would fail at the first tile that is not as its example was."""
    module = nn.Conv2d(3, 4, 3, padding=1)
    example = torch.zeros(1, 3, 48, 48)
    exported = torch.export.export(module.eval(), (example,), dynamic_shapes=sizes)
    file = io.BytesIO()
    torch.export.save(exported, file)
    bundle = own_bundle(tmp_path / "b", file.getvalue(), stride=4)
    with pytest.raises(BundleError, match=r"not of any size: export it with"):
        bundle.network()


@pytest.mark.parametrize(
    ("entry_point", "arguments", "complaint"),
    [
        ("os:system", {"command": "true"}, "neither a class of networks nor a function"),
        ("own_networks:says_nothing", SIZES, "neither a class of networks nor a function"),
        ("own_networks:nothing", SIZES, "has no attribute 'nothing'"),
        ("no_such_package.nets:Net", SIZES, "install what has it"),
        ("own_networks:Hourglass", {"bands": 3}, "missing 1 required"),
        ("own_networks:Coarse", SIZES, "do not fit"),
        ("own_networks:Coarse", SIZES | {"dims": 7}, "dims.: 7}: 7"),  # a KeyError
        ("own_networks:picky", SIZES, "AssertionError"),
    ],
)
def test_an_entry_point_that_makes_no_such_network_is_refused(
    tmp_path: Path, entry_point: str, arguments: dict[str, object], complaint: str
) -> None:
    """A bundle could have any function of any package called; or fail without a word."""
    with pytest.raises(BundleError, match=complaint):
        by_entry_point(tmp_path / "b", entry_point, **arguments).network()


def test_a_module_that_does_not_load_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One such bundle would end a batch, or show a traceback of somebody else's code."""
    (tmp_path / "nets_without_licence.py").write_text("raise ValueError('no licence')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BundleError, match="nets_without_licence:Net: no licence"):
        by_entry_point(tmp_path / "b", "nets_without_licence:Net", **SIZES).network()


@pytest.mark.parametrize("entry_point", ["nets.UNet", "nets:", ":UNet", "nets:3d", ""])
def test_an_entry_point_of_another_form_is_refused(entry_point: str) -> None:
    """It would be taken for a program that is missing, or imported in part."""
    with pytest.raises(BundleError, match=r"package\.module:factory"):
        CustomArchitecture(family="custom", dims=2, output_stride=1, entry_point=entry_point)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x[:, :1]], 1) + torch.rand_like(x[:, :1])


class Strict(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2] % 48 == 0
        return x


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x[:, :1]], 1).repeat(2, 1, 1, 1)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("module", "complaint"),
    [
        (nn.Conv2d(2, 4, 1), "does not take an image of 3 bands"),
        (nn.Conv2d(3, 5, 1), "gives 5 channels, the bundle has 4 classes"),
        (nn.Conv2d(3, 4, 3), "whole part"),
        (nn.Conv2d(3, 4, 8, stride=8), "divides the output stride of 4 px"),
        (Pair(), "one tensor of 4 axes for one image, found tuple"),
        (Noisy(), "other logits for the same image"),
        (Strict(), "does not take an image .*: assert"),
        (Twice(), r"for one image, found \(2, 4, 16, 16\)"),
    ],
)
def test_what_is_no_network_of_the_bundle_is_refused_at_once(
    module: nn.Module, complaint: str
) -> None:
    """It would fail in the first tile, or write labels of the wrong place."""
    with pytest.raises(BundleError, match=complaint):
        wrapped(module, stride=4)


def test_logits_at_a_part_of_the_size_are_brought_to_the_input(tmp_path: Path) -> None:
    """Labels would lie at a quarter of their place."""
    network = wrapped(Coarse(3, 4), stride=4)
    image_BCS = torch.randn(1, 3, 32, 48)
    with torch.inference_mode():
        found = network(image_BCS, Frame((0, 0), (32, 48)))
        coarse = network.module(image_BCS)
    wanted = nn.functional.interpolate(coarse, size=(32, 48), mode="bilinear")
    assert torch.equal(found, wanted)


def test_the_halo_is_what_the_probe_finds_with_the_upsampling() -> None:
    """Two convolutions of 3 reach 3 px before and 1 px after; interpolation adds a place."""
    network = wrapped(Coarse(3, 4), stride=4)
    found = probe_custom(network)
    assert found.halo == Halo((8, 8), (4, 4))
    reach = custom_reach(network, found, crop=(64, 64), context="window")
    assert reach == Reach(stride=4, halo=Halo((8, 8), (4, 4)))


def test_strips_grow_until_a_wide_network_ends_in_them() -> None:
    """A network that reaches further than the first strips would be called GLOBAL."""
    wide = [nn.Conv2d(3, 3, 3, padding=400, dilation=400), nn.Conv2d(3, 4, 1)]
    assert probe_custom(wrapped(nn.Sequential(*wide), stride=1)).halo == Halo(
        (400,) * 2, (400,) * 2
    )


def test_what_mixes_the_whole_image_is_refused_by_name_and_run_with_context_tile() -> None:
    """It would be tiled as if it were exact; or nobody would know which layer it is."""
    network = wrapped(Squeezed(3, 4), stride=1)
    found = probe_custom(network)
    for context in ("window", "scene"):
        with pytest.raises(BundleError, match="GLOBAL, gate at fault"):
            custom_reach(network, found, crop=(64, 64), context=context)
    reach = custom_reach(network, found, crop=(64, 65), context="tile")
    assert reach.halo == Halo((32, 33), (32, 33))


def test_the_layers_of_a_program_have_the_names_they_had(tmp_path: Path) -> None:
    """A program would be GLOBAL, and nobody could say why."""
    data = exported(Squeezed(3, 4), stride=1)
    network = own_bundle(tmp_path / "b", data, stride=1).network()
    assert isinstance(network, CustomNetwork)
    assert probe_custom(network).layers == ("gate",)


def test_work_and_bytes_are_those_counted_by_hand() -> None:
    """The plan would be made for another network's memory and time."""
    module = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 4, 1))
    trial = trial_of(wrapped(module, stride=1))
    assert trial.work_px == 9 * 3 * 32 + 32 * 4
    # The ReLU's input and output, beside the image.
    assert trial.bytes_px == 4 * (3 + 32 + 32)


def test_a_value_that_is_let_go_of_is_not_counted_any_more() -> None:
    """Every deep network would seem to need the memory of all its layers at once."""
    layers = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(30)]
    trial = trial_of(wrapped(nn.Sequential(nn.Conv2d(3, 4, 1), *layers), stride=1))
    assert trial.bytes_px == 4 * (3 + 4 + 4)


def test_another_version_of_the_code_is_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run would be resumed with another network under the same name."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lone_network.py").write_text("class Net: pass\n")
    first = code_version("lone_network:Net")
    (tmp_path / "lone_network.py").write_text("class Net: depth = 2\n")
    assert list(first) == ["lone_network"]
    assert code_version("lone_network:Net") != first
    assert code_version("torchvision.models:resnet18") == {
        "torchvision": version("torchvision").partition("+")[0]
    }


def test_a_bundle_is_saved_with_the_halo_that_was_found(tmp_path: Path) -> None:
    """Every plan would probe again, which takes minutes for a deep network."""
    draft = by_entry_point(tmp_path / "b", "own_networks:Hourglass", **SIZES)
    saved = save_custom(tmp_path / "c", draft, Hourglass(3, 4).state_dict())
    assert isinstance(saved.architecture, CustomArchitecture)
    assert saved.architecture.halo == Halo((20, 20), (20, 20))
    assert probe_bundle(saved.path)["problem"] is None
    network = saved.network()
    assert isinstance(network, CustomNetwork)
    assert known_probe(network).halo == Halo((20, 20), (20, 20))


def test_a_halo_that_a_bundle_states_too_short_is_told(tmp_path: Path) -> None:
    """Its tiles would be called exact with seams between them."""
    draft = by_entry_point(tmp_path / "b", "own_networks:Hourglass", **SIZES)
    assert isinstance(draft.architecture, CustomArchitecture)
    short = replace(draft.architecture, halo=Halo((20, 20), (16, 20)))
    weights = Hourglass(3, 4).state_dict()
    wrong = save_bundle(tmp_path / "c", replace(draft, architecture=short), weights)
    problem = probe_bundle(wrong.path)["problem"]
    assert "(20, 20) px after a region" in problem
    assert "(16, 20)" in problem


def test_nothing_is_written_of_a_network_that_does_not_run(tmp_path: Path) -> None:
    """A bundle would lie there that nothing can be done with."""
    draft = by_entry_point(tmp_path / "b", "own_networks:Hourglass", **SIZES)
    with pytest.raises(BundleError, match="do not fit"):
        save_custom(tmp_path / "c", draft, Coarse(3, 4).state_dict())
    assert not (tmp_path / "c").exists()
