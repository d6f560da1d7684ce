from __future__ import annotations

import datetime
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pipeline.errors import BundleError
from pipeline.models.bundle import (
    MODEL_FILE,
    PROGRAM_FILE,
    Architecture,
    Bundle,
    ClassInfo,
    InputSpec,
    Scaling,
    load_bundle,
    save_bundle,
)
from pipeline.models.frame import Frame
from pipeline.models.fresh import new_bundle

SLIM = Architecture(
    family="v3", backbone="slim", dims=2, output_stride=4, rates=(1, 2), image_pooling=False
)
SLIM_3D = replace(SLIM, dims=3, output_stride=2)
POOLED = replace(SLIM, backbone="resnet18", output_stride=8, image_pooling=True)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return new_bundle(
        tmp_path / "model", architecture=SLIM, bands=("red", "nir"), classes=3, seed=7
    )


def edit(bundle: Bundle, **changes: Any) -> None:
    """Change keys of model.yaml; a None removes the key."""
    path = bundle.path / "model.yaml"
    document = yaml.safe_load(path.read_text()) | changes
    path.write_text(yaml.safe_dump({k: v for k, v in document.items() if v is not None}))


def test_a_bundle_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    """A value would be lost or change its type on the way through YAML."""
    written = Bundle(
        name="zion",
        version=3,
        architecture=SLIM_3D,
        classes=(
            ClassInfo(id=7, name="wasser, tief", color="#2b6cb0"),
            ClassInfo(id=300, name="forêt", color="#276749"),
        ),
        ignore_index=65535,
        input=InputSpec(
            bands=("t1",),
            dtype="int16",
            scaling=Scaling(type="min-max", minimum=(-100.0,), maximum=(1e-3,)),
            spacing_mm=(3.0, 1.5, 1.5),
        ),
        crop=(32, 64, 64),
        crf={"iterations": 10, "smoothness": {"weight": 3, "position": 3}},
        training={"metrics": {"iou": 0.5}},
    )
    fresh = new_bundle(tmp_path / "a", architecture=SLIM_3D, bands=1, classes=2, seed=0)
    weights = fresh.network().state_dict()
    saved = save_bundle(tmp_path / "b" / "deep", written, weights)
    read = load_bundle(tmp_path / "b" / "deep")
    assert read == saved
    assert read == replace(written, path=read.path, weights_sha256=fresh.weights_sha256)
    assert (read.class_values, read.mask_dtype, read.mask_nodata) == ((7, 300), "uint16", 65535)
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["deep"], "scratch left behind"


def test_the_example_of_the_design_is_a_bundle(bundle: Bundle) -> None:
    """The format would no longer be the one that the documentation shows."""
    text = f"""
name: zion-landcover
version: 1
architecture: {{family: v3, backbone: resnet18, dims: 2, output_stride: 8,
               rates: [6, 12, 18], image_pooling: true}}
classes: [{{id: 0, name: water, color: "#2b6cb0"}}, {{id: 1, name: forest, color: "#276749"}}]
ignore_index: 255
input:
  bands: [blue, green, red, nir]
  dtype: uint16
  scaling: {{type: z-score, mean: [9000, 9100, 9200.5, 9300], std: 1200}}
  pixel_size_m: 30
crop: [512, 512]
crf:
  iterations: 10
  smoothness: {{weight: 3, position: 3}}
training: {{data: [], metrics: {{}}}}
weights_sha256: {bundle.weights_sha256}
"""
    (bundle.path / "model.yaml").write_text(text)
    read = load_bundle(bundle.path)
    assert read.input.scaling.pairs(4)[2] == (9200.5, 1200.0)
    assert (read.input.pixel_size_m, read.mask_dtype, read.mask_nodata) == (30.0, "uint8", 255)
    assert read.crf is not None
    assert read.crf["smoothness"] == {"weight": 3, "position": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "unknown key colour"),
        ({"path": "/etc"}, "path must be"),
        ({"crop": None}, "key crop is missing"),
        ({"weights_sha256": None}, "weights_sha256 is missing"),
        ({"version": "one"}, "version must be of type int, got 'one'"),
        ({"version": True}, "version must be of type int, got True"),
        ({"crop": [512]}, "crop .* must be 2 positive numbers"),
        ({"crop": 512}, "crop must be a list"),
        ({"architecture": {"family": "v3"}}, "key architecture.backbone is missing"),
        ({"architecture": "v3"}, "architecture must be a mapping"),
        ({"classes": [{"id": 0, "name": "a", "color": "red"}] * 2}, "color of class 'a'"),
        ({"classes": [{"id": 0, "name": "a", "color": "#ff0000"}] * 2}, "different ids"),
        ({"classes": [{"id": 0, "name": "a", "colr": "#ff0000"}]}, r"key classes\[0\]\.colr"),
        ({"ignore_index": 2}, "ignore_index 2 is the id of a class"),
        ({"crf": {"date": datetime.date(2024, 1, 1)}}, "crf holds a value"),
    ],
)
def test_a_wrong_bundle_says_where_in_one_line(
    bundle: Bundle, changes: dict[str, Any], message: str
) -> None:
    """A typing error would be taken for a default, or end in a traceback."""
    edit(bundle, **changes)
    with pytest.raises(BundleError, match=message) as caught:
        load_bundle(bundle.path)
    assert "\n" not in str(caught.value)
    assert str(bundle.path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "- 1", "name: [", "name: 1\n\tx: 2", "a: !!python/none x"])
def test_a_file_that_is_no_bundle_is_refused(bundle: Bundle, text: str) -> None:
    """Bad YAML, or YAML that runs code, would not be one line."""
    (bundle.path / "model.yaml").write_text(text)
    with pytest.raises(BundleError) as caught:
        load_bundle(bundle.path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "zscore"}, "type must be one of z-score"),
        ({"type": "z-score", "mean": 1}, "takes mean and std, got mean"),
        ({"type": "z-score", "mean": 1, "std": 0}, "std must be above 0"),
        ({"type": "clip", "minimum": 1, "maximum": 1}, "minimum 1.0 must be below"),
        ({"type": "z-score", "mean": 1, "std": 1, "scale": 1}, "got mean and std and scale"),
        ({"type": "z-score", "mean": [1, 2, 3], "std": 1}, "3 numbers for 2 bands"),
        ({"type": "z-score", "mean": [1, float("nan")], "std": 1}, "finite"),
    ],
)
def test_a_wrong_scaling_is_refused(bundle: Bundle, scaling: dict[str, Any], message: str) -> None:
    """Pixels would be scaled by a default, by nothing, or by another band's statistics."""
    edit(bundle, input={"bands": ["red", "nir"], "dtype": "uint8", "scaling": scaling})
    with pytest.raises(BundleError, match=message):
        load_bundle(bundle.path)


def test_a_missing_file_is_named(bundle: Bundle, tmp_path: Path) -> None:
    """A directory without weights would be accepted, and fail in every worker."""
    with pytest.raises(BundleError, match=r"no file model\.yaml"):
        load_bundle(tmp_path / "nowhere")
    (bundle.path / "weights.safetensors").unlink()
    with pytest.raises(BundleError, match=r"no file weights\.safetensors"):
        load_bundle(bundle.path)


def test_weights_that_fail_their_checksum_are_not_used(bundle: Bundle) -> None:
    """A damaged or exchanged file would give another mask under the same digest."""
    path = bundle.path / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(BundleError, match="changed or cut short"):
        load_bundle(bundle.path).network()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(bundle: Bundle, value: float) -> None:
    """Every logit would be NaN, every pixel the first class, and the run be called done."""
    state = bundle.network().state_dict()
    state["classifier.1.bias"][1] = value
    spoilt = save_bundle(bundle.path, bundle, state)
    with pytest.raises(BundleError, match=r"NaN or infinity in classifier\.1\.bias"):
        spoilt.network()


def test_weights_of_another_architecture_are_refused(bundle: Bundle) -> None:
    """Layers without weights would keep what was in memory."""
    for changes in ({"rates": (1, 2, 3)}, {"output_stride": 8}):
        other = replace(bundle, architecture=replace(SLIM, **changes))
        with pytest.raises(BundleError, match="do not fit") as caught:
            other.network()
        assert "\n" not in str(caught.value)


def test_the_digest_knows_the_weights_and_every_value_but_not_the_place(
    bundle: Bundle, tmp_path: Path
) -> None:
    """Two models would share a fingerprint, or one model have two."""
    copy = save_bundle(tmp_path / "copy", bundle, bundle.network().state_dict())
    assert copy.digest == bundle.digest
    assert (tmp_path / "copy" / "model.yaml").read_bytes() == (
        bundle.path / "model.yaml"
    ).read_bytes()
    others = [
        replace(bundle, crop=(64, 64)),
        replace(bundle, weights_sha256="0" * 64),
        replace(bundle, crf={"iterations": 5}),
        replace(bundle, classes=tuple(reversed(bundle.classes))),
    ]
    assert len({bundle.digest, *(other.digest for other in others)}) == 5


def test_the_same_seed_gives_the_same_bundle(bundle: Bundle, tmp_path: Path) -> None:
    """Benchmarks and tests of two runs would use two networks; or torch's state would leak."""
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    again = new_bundle(
        tmp_path / "again", architecture=SLIM, bands=("red", "nir"), classes=3, seed=7
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert again.digest == bundle.digest
    other = new_bundle(
        tmp_path / "other", architecture=SLIM, bands=("red", "nir"), classes=3, seed=8
    )
    assert other.weights_sha256 != bundle.weights_sha256


@pytest.mark.parametrize("architecture", [SLIM, SLIM_3D, POOLED], ids=["slim", "3-d", "pooled"])
@pytest.mark.parametrize("scale", [50, 1000])
def test_a_fresh_network_sees_several_classes(
    architecture: Architecture, scale: float, tmp_path: Path
) -> None:
    """One class everywhere would make every comparison of masks trivially true."""
    bundle = new_bundle(tmp_path / "m", architecture=architecture, bands=2, classes=4, seed=1)
    size = {2: (128, 160), 3: (32, 32, 48)}[architecture.dims]
    image_CS = np.random.default_rng(0).normal(size=(2, *size)).astype(np.float32)
    network = bundle.network()
    with torch.inference_mode():
        image_BCS = torch.from_numpy(image_CS * scale / 100)[None]
        logits_KS = network(image_BCS, Frame((0,) * len(size), size))[0]
    counts = torch.bincount(logits_KS.argmax(0).flatten(), minlength=4) / logits_KS[0].numel()
    assert (counts > 0.02).sum() >= 3
    assert counts.max() < 0.8


def test_a_bundle_is_replaced_whole_and_nothing_else_is(bundle: Bundle, tmp_path: Path) -> None:
    """Files of an old bundle would stay beside new ones, or a user's notes be lost."""
    (bundle.path / "README.md").write_text("trained in May")
    (bundle.path / PROGRAM_FILE).touch()
    zeros = {name: value * 0 for name, value in bundle.network().state_dict().items()}
    save_bundle(bundle.path, replace(bundle, version=2), zeros)
    saved = load_bundle(bundle.path)
    assert saved.version == 2
    assert all((value == 0).all() for value in saved.network().state_dict().values())
    names = sorted(path.name for path in bundle.path.iterdir())
    assert names == ["README.md", MODEL_FILE, saved.weights_file.name]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(BundleError, match="no model bundle"):
        save_bundle(tmp_path / "mine", bundle, zeros)
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize("changed", [False, True], ids=["the weights stay", "they change"])
def test_a_bundle_can_be_read_at_any_moment_while_it_is_replaced(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    """A kill while `crf tune` writes its best into a bundle would leave one that is refused."""
    found: list[tuple[int, bool]] = []

    def watched(step: Callable[..., Any]) -> Callable[..., Any]:
        def look(path: Path, *args: Any, **named: Any) -> Any:
            here = load_bundle(bundle.path)
            weights = here.network().state_dict().values()
            found.append((here.version, all((value == 0).all() for value in weights)))
            return step(path, *args, **named)

        return look

    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, watched(getattr(Path, name)))
    weights = bundle.network().state_dict()
    fresh = {name: value * 0 for name, value in weights.items()} if changed else weights
    assert save_bundle(bundle.path, replace(bundle, version=3), fresh).version == 3
    assert found[0] == (bundle.version, False)
    assert found[-1] == (3, changed)
    assert set(found) == {found[0], found[-1]}


def test_a_bundle_whose_last_step_was_lost_is_read_copied_and_replaced(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights have another name then, which the next to save it must not lose or leave."""
    rename = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if target.name == bundle.weights_file.name:
            raise KeyboardInterrupt
        return rename(path, target)

    zeros = {name: value * 0 for name, value in bundle.network().state_dict().items()}
    before = bundle.network().state_dict()
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_bundle(bundle.path, replace(bundle, version=2), zeros)
    monkeypatch.undo()
    for number, weights in enumerate((zeros, before)):
        left = load_bundle(shutil.copytree(bundle.path, tmp_path / str(number)))
        assert left.version == 2
        assert all((value == 0).all() for value in left.network().state_dict().values())
        found = save_bundle(left.path, left, weights).network().state_dict()
        assert all(torch.equal(found[name], value) for name, value in weights.items())
        names = sorted(path.name for path in left.path.iterdir())
        assert names == [MODEL_FILE, "weights.safetensors"]


def test_a_bundle_is_read_without_torch(bundle: Bundle) -> None:
    """``model show`` would take seconds to print ten lines."""
    code = (
        "import sys; from pipeline.models.bundle import load_bundle;"
        "load_bundle(sys.argv[1]).digest; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(bundle.path)], check=True)


def test_a_saved_bundle_has_the_digest_of_the_one_that_is_loaded(tmp_path: Path) -> None:
    """A whole number given for a float would otherwise name two bundles."""
    architecture = Architecture(
        family="v3", backbone="slim", dims=2, output_stride=8, rates=(1, 2), image_pooling=False
    )
    bundle = new_bundle(tmp_path / "b", architecture=architecture, bands=1, classes=2, seed=0)
    whole = replace(bundle, input=replace(bundle.input, pixel_size_m=30))
    saved = save_bundle(tmp_path / "c", whole, bundle.network().state_dict())
    assert saved.digest == load_bundle(tmp_path / "c").digest
