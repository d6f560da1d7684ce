from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from pipeline.errors import BundleError
from pipeline.models.layouts.checkpoint import read_checkpoint

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def same(found: Any) -> bool:
    """Whether these are the weights, name for name; files may have them in another order."""
    return found.keys() == WEIGHTS.keys() and all(
        torch.equal(found[name], weight) for name, weight in WEIGHTS.items()
    )


def test_each_format_gives_the_same_tensors(tmp_path: Path) -> None:
    """A format would be read as another, or lose its names."""
    torch.save(WEIGHTS, tmp_path / "new.pth")
    torch.save(WEIGHTS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(WEIGHTS, tmp_path / "w.safetensors")
    np.savez(tmp_path / "w.npz", **{name: w.numpy() for name, w in WEIGHTS.items()})
    for path in tmp_path.iterdir():
        found = read_checkpoint(path)
        assert found.file == path.name
        assert same(found.tensors), path


@pytest.mark.parametrize("key", ["state_dict", "model_state", "model"])
@pytest.mark.parametrize("outer", ["", "module.", "model."])
def test_a_training_loops_checkpoint_is_unwrapped(tmp_path: Path, key: str, outer: str) -> None:
    """Published files of vainf and jfzhang could not be read: they hold a score of numpy's."""
    state = {outer + name: weight for name, weight in WEIGHTS.items()}
    held = {"epoch": 3, "best": np.float64(0.5), "optimizer": {"lr": [0.1]}, key: state}
    torch.save(held, tmp_path / "w.pth")
    found = read_checkpoint(tmp_path / "w.pth")
    assert same(found.tensors)
    assert found.beside == {"epoch": 3, "best": 0.5, "optimizer": {"lr": [0.1]}}


def test_a_score_of_an_older_numpy_is_read(tmp_path: Path) -> None:
    """Checkpoints of before numpy 2 have its scalars under another name."""
    path = tmp_path / "w.pth"
    torch.save({"best": np.float64(0.5), "state_dict": WEIGHTS}, path,
               _use_new_zipfile_serialization=False)  # fmt: skip
    data = path.read_bytes()
    assert b"numpy._core.multiarray" in data
    path.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert read_checkpoint(path).beside == {"best": 0.5}


class Trap:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("sprung"),)


def test_nothing_that_a_file_holds_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights from the internet could run any program."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": WEIGHTS, "trap": Trap()}, "trap.pth")
    np.savez("trap.npz", trap=np.array([Trap()], dtype=object))
    for name in ("trap.pth", "trap.npz"):
        with pytest.raises(BundleError, match="which is not run"):
            read_checkpoint(Path(name))
    assert not Path("sprung").exists()


@pytest.mark.parametrize("old", [True, False])
def test_a_file_cut_short_is_refused_with_one_line(tmp_path: Path, old: bool) -> None:
    """A download that broke off would end in a traceback, or in half a network."""
    path = tmp_path / "w.pth"
    torch.save({"state_dict": WEIGHTS}, path, _use_new_zipfile_serialization=not old)
    data = path.read_bytes()
    for length in range(0, len(data), max(1, len(data) // 60)):
        path.write_bytes(data[:length])
        with pytest.raises(BundleError) as caught:
            read_checkpoint(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "held", "message"),
    [
        ("w.pth", torch.ones(2), "no state dict, but a Tensor"),
        ("w.pth", {"a": 1}, "a is no tensor"),
        ("w.pth", nn.Linear(1, 1), "Unsupported global: GLOBAL torch.nn.modules.linear.Linear"),
        ("model.ckpt.index", None, "numpy.savez"),
        ("model.ckpt.data-00000-of-00001", None, "numpy.savez"),
        ("w.safetensors", None, "header too small"),
        ("none.pth", ..., "cannot read"),
        ("/", ..., "cannot read"),
    ],
)
def test_what_is_no_state_dict_is_refused(
    tmp_path: Path, name: str, held: Any, message: str
) -> None:
    """The user would not know what to bring instead."""
    path = tmp_path / name
    if held is None:
        path.write_bytes(b"x")
    elif held is not ...:
        torch.save(held, path)
    with pytest.raises(BundleError, match=message) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert "trust" not in str(caught.value)


def test_tensorflows_prefix_is_told_from_a_file(tmp_path: Path) -> None:
    """``model.ckpt`` names three files there, and none of that name."""
    (tmp_path / "model.ckpt.index").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"numpy\.savez"):
        read_checkpoint(tmp_path / "model.ckpt")
