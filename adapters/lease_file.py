"""One run directory, one owner: a lease in a file, renewed while its process lives.

A dead process on this host is taken over at once, one on another host when its lease expires. The
token changes hands with the lease, so that a stale owner's workers are refused at their next write.
A directory in which nothing came to be goes with its lease.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from pipeline.errors import LeaseHeldError, StoreError

log = logging.getLogger(__name__)

EXPIRY_S = 300.0
"""Longer than pydensecrf, which holds the interpreter lock, takes for a tile."""

RENEW_S = 15.0

KINDS = {"token": str, "host": str, "boot": str, "pid": int, "started": int, "expires": float}


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a lease, as written in the file."""

    token: str
    host: str

    boot: str
    """The running kernel and its process namespace: process ids mean nothing in another."""

    pid: int

    started: int
    """When the process started, in the kernel's ticks since boot: process ids are reused."""

    expires: float
    """Wall-clock second after which another host may take over."""

    @classmethod
    def me(cls, token: str) -> Holder:
        """This process, from now on."""
        pid = os.getpid()
        return cls(
            token=token,
            host=socket.gethostname(),
            boot=_boot_id(),
            pid=pid,
            started=_start_ticks(pid),
            expires=time.time() + EXPIRY_S,
        )

    @property
    def alive(self) -> bool:
        """False for a dead process of this host, and for another host's when expired."""
        if self.host == socket.gethostname() and self.boot == _boot_id():
            try:
                return _start_ticks(self.pid) == self.started
            except OSError:
                return False
        return time.time() < self.expires


@dataclass(frozen=True, slots=True)
class LeaseGuard:
    """The picklable half that workers carry: does the run still own its directory?"""

    path: Path
    token: str

    def check(self) -> None:
        """Raise LeaseHeldError unless the lease still carries this run's token."""
        holder = read_holder(self.path)
        if holder is None or holder.token != self.token:
            raise LeaseHeldError(f"{self.path.parent}: another run has taken over this directory")


class LeaseFile:
    """The driver's half: ``with LeaseFile(run_dir) as guard``.

    Raises LeaseHeldError on entry, and StoreError where the directory cannot be written to.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "lease.json"
        self._token = uuid.uuid4().hex
        self._closing = threading.Event()

    def __enter__(self) -> LeaseGuard:
        try:
            while not self._taken():
                self._path.parent.mkdir(parents=True, exist_ok=True)
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(
                f"the run directory {self._path.parent} cannot be written to: {error.strerror};"
                " choose another --run-dir, or free the disk"
            ) from error
        threading.Thread(target=self._renew, name="lease", daemon=True).start()
        return LeaseGuard(self._path, self._token)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        lock = _lock_of(self._path)
        with _locked(self._path):
            if self._owned():
                self._path.unlink()
            empty = [*lock.parent.iterdir()] == [lock]
            with suppress(OSError):  # the directory is somebody's own
                if empty:
                    lock.unlink()
        with suppress(OSError):  # not empty, a mount, or its parent is not ours
            if empty:
                lock.parent.rmdir()

    def _taken(self) -> bool:
        """False where there is no directory, or the last owner has just deleted it."""
        try:
            with _locked(self._path):
                holder = read_holder(self._path)
                if holder is not None and holder.alive:
                    raise LeaseHeldError(
                        f"{self._path.parent}: process {holder.pid} on {holder.host} is working"
                        " here; wait for it, or choose another directory"
                    )
                self._write()
        except FileNotFoundError as error:
            if error.filename != str(_lock_of(self._path)):
                raise
            return False
        return True

    def _owned(self) -> bool:
        holder = read_holder(self._path)
        return holder is not None and holder.token == self._token

    def _renew(self) -> None:
        while not self._closing.wait(RENEW_S):
            try:
                with _locked(self._path):
                    if self._closing.is_set() or not self._owned():
                        return
                    self._write()
            except OSError as error:  # a full disk, a mount that is away: try again in a while
                log.warning("the lease %s could not be renewed: %s", self._path, error)

    def _write(self) -> None:
        draft = self._path.with_name(f"lease-{self._token}.tmp")
        draft.write_text(json.dumps(asdict(Holder.me(self._token))))
        draft.replace(self._path)


def read_holder(path: Path) -> Holder | None:
    """Who holds the lease at ``path``; None for nobody. Raises StoreError for a damaged file."""
    try:
        holder = Holder(**json.loads(path.read_text()))
        if not all(isinstance(getattr(holder, name), kind) for name, kind in KINDS.items()):
            raise TypeError("a value of another kind")
        return holder
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise StoreError(f"{path} is damaged ({error}); delete it if no run is alive") from error


def _start_ticks(pid: int) -> int:
    """Field 22 of /proc/PID/stat: unlike a time of day, no clock that is set moves it.

    0 for a process that has ended and waits to be buried. Raises OSError where there is none.
    """
    state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return 0 if state == "Z" else int(fields[18])


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of the lease at ``path``. Raises OSError, where its directory is gone too."""
    name = _lock_of(path)
    while True:
        with name.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_file(lock.fileno(), name):  # else its last holder has deleted it
                yield
                return


def _lock_of(path: Path) -> Path:
    return path.with_name("lease.lock")


def _is_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _boot_id() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
