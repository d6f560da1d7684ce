"""A Ray cluster of several nodes on this machine, in a process of its own.

``Raylets`` is for tests; run as a script, this file is the cluster and obeys its standard input:
``add`` starts a node, ``remove ID`` kills one as a power cut would, the end of the input ends all.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

CPUS = 2
"""Logical cores of each node; the head has none."""


class Raylets:
    """A head without cores and ``count`` nodes that come and go.

    Processes that join need ``env``, which holds the cluster's token and a home of its own; they
    find the modules beside this one.
    """

    def __init__(self, home: Path, *, count: int = 2) -> None:
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
        self.env = os.environ | {
            "HOME": str(home),
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.env.pop("RAY_ADDRESS", None)
        self._log = (home / "raylets.log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=self.env,
        )
        self.address: str = self._answer()
        self.nodes = [self._ask("add") for _ in range(count)]

    def add(self) -> str:
        """Start a node; return its id once it is part of the cluster."""
        self.nodes.append(self._ask("add"))
        return self.nodes[-1]

    def remove(self, node: str) -> None:
        """Kill a node's processes without a farewell; the cluster finds out by itself."""
        self.nodes.remove(node)
        self._ask(f"remove {node}")

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the cluster's process ended; see {self._log.name}")
        return str(json.loads(line))

    def __enter__(self) -> Raylets:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate(timeout=60)
        self._log.close()


def main() -> None:
    """Be the cluster."""
    # Ray writes to standard output, too.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from ray.cluster_utils import Cluster

    def answer(text: str) -> None:
        answers.write(json.dumps(text) + "\n")
        answers.flush()

    memory = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, **memory},
    )
    answer(cluster.address)
    nodes: dict[str, Any] = {}
    for line in sys.stdin:
        words = line.split()
        if words[0] == "add":
            node = cluster.add_node(num_cpus=CPUS, wait=True, **memory)
            nodes[node.node_id] = node
            answer(node.node_id)
        else:
            cluster.remove_node(nodes.pop(words[1]), allow_graceful=False)
            answer(words[1])
    cluster.shutdown()


if __name__ == "__main__":
    main()
