"""What is read from YAML is what stands there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.models.bundle import load_bundle
from pipeline.models.document import read_yaml
from workflows.crf_asked import read_crf
from workflows.legend import read_classes
from workflows.workflow_file import read_workflow

READERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a workflow": (read_workflow, "name: a\ncron: 0 4 * * *\ncron: 0 5 * * *\n"),
    "a CRF": (read_crf, "crf:\n  iterations: 5\n  iterations: 10\n"),
    "classes": (read_classes, "- id: 1\n  name: water\n  name: forest\n"),
    "a bundle": (lambda path: load_bundle(path.parent), "name: a\nversion: 1\nversion: 2\n"),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_key_that_is_there_twice_is_refused_with_its_place(tmp_path: Path, kind: str) -> None:
    """The last one would win in silence, and the run be another than the file's first lines say."""
    read, text = READERS[kind]
    path = tmp_path / "model.yaml"
    path.write_text(text)
    key = text.splitlines()[-1].split(":")[0].strip()
    with pytest.raises(PipelineError, match=rf"{path}.*, line 3: key {key} is there twice"):
        read(path)


def test_a_key_may_be_there_once_in_each_mapping_and_replace_a_merged_one(tmp_path: Path) -> None:
    """Two classes could not both have a name, nor two kernels share all but a weight."""
    path = tmp_path / "a.yaml"
    path.write_text("a: &a {weight: 1, x: 2}\nb: {<<: *a, weight: 3}\n1: one\n'1': text\n")
    assert read_yaml(path) == {
        "a": {"weight": 1, "x": 2},
        "b": {"weight": 3, "x": 2},
        1: "one",
        "1": "text",
    }
