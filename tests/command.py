"""The real command in this process, and what a refusal must look like."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from workflows import cli


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a user sees."""

    code: int
    out: str
    err: str

    @property
    def manifest(self) -> dict[str, Any]:
        """The object that ``--json`` prints last."""
        values: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return values

    @property
    def complaint(self) -> str:
        """The one line of an error: exactly one, the last, and no traceback before it."""
        lines = self.err.splitlines()
        assert [n for n, line in enumerate(lines, 1) if line.startswith("terravox: ")] == [
            len(lines)
        ], self.err
        assert "Traceback" not in self.err
        assert "internal error" not in self.err
        return lines[-1]

    def refuses(self, *words: object, code: int = 2) -> None:
        """The exit code, and a line that names all of ``words``."""
        assert self.code == code, self.err
        for word in words:
            assert str(word) in self.complaint


class Command:
    """``terravox WORDS`` with argv and the standard streams of a real call."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path
    ) -> None:
        self._monkeypatch, self._capsys, self.model = monkeypatch, capsys, model

    def __call__(self, *words: object) -> Answer:
        """Run it."""
        self._monkeypatch.setattr(sys, "argv", ["terravox", *map(str, words)])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = self._capsys.readouterr()
        return Answer(code=int(exit_.value.code or 0), out=out, err=err)

    def segment(
        self, source: Path | str, output: Path, *more: object, model: Path | None = None
    ) -> Answer:
        """``terravox segment`` in this process, in fp32, without tracking."""
        return self(
            "segment", source, "-o", output, "--model", model or self.model, "--backend",
            "serial", "--tracking-uri", "none", "--precision", "fp32", "--json", *more,
        )  # fmt: skip


def tree(folder: Path) -> Mapping[Path, bytes | None]:
    """Everything in a folder, with the content of files: what a refused command may not change."""
    return {
        path: path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name != "lease.lock"
    }
