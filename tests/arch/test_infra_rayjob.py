"""The RayJob: required fields, checked by hand.

This is not the schema of KubeRay's CRD, which is a megabyte of YAML and not ours to carry: it knows
the fields that we know to matter. A field misspelt elsewhere is found by the API server alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

INFRA = Path(__file__).parents[2] / "infra"
RAYJOB = INFRA / "kubernetes" / "rayjob.yaml"
STORAGE = INFRA / "kubernetes" / "storage.yaml"


def constraint(package: str) -> str:
    text = (INFRA / "constraints.txt").read_text()
    (version,) = re.findall(rf"^{package}==(\S+)$", text, re.M)
    return str(version)


def rayjob_faults(job: dict[str, Any]) -> Iterator[str]:
    """What KubeRay would refuse, or what would cost us a run, in a RayJob."""
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    head, (cpu, gpu) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    entrypoint = spec["entrypoint"]
    holds = {
        "kind": (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob"),
        "entrypoint": entrypoint.startswith("terravox batch ")
        and "--ray-address auto" in entrypoint,
        "workers": re.search(r"--workers [1-9]", entrypoint),
        "rayVersion": cluster["rayVersion"] == constraint("ray"),
        "authOptions": cluster["authOptions"]["mode"] == "token",
        "autoscaler": cluster["enableInTreeAutoscaling"]
        and cluster["autoscalerOptions"]["version"] == "v2",
        "head": head["rayStartParams"]["num-cpus"] == "0",
        "retries": spec["backoffLimit"] >= 1,
        "deadline": spec["activeDeadlineSeconds"] > 0,
        "cleaning up": bool(spec.get("shutdownAfterJobFinishes")) != ("deletionStrategy" in spec),
        "gpu group from zero": gpu["minReplicas"] == gpu["replicas"] == 0,
        "replicas": all(g["minReplicas"] <= g["replicas"] <= g["maxReplicas"] for g in (cpu, gpu)),
    }
    yield from (fault for fault, right in holds.items() if not right)
    for group in (head, cpu, gpu):
        yield from ray_pod_faults(group["template"]["spec"], gpus="1" if group is gpu else "0")


def ray_pod_faults(pod: dict[str, Any], *, gpus: str) -> Iterator[str]:
    """What would be wrong in one pod of the Ray cluster."""
    (container,), (volume,) = pod["containers"], pod["volumes"]
    (claim,) = yaml.safe_load_all(STORAGE.read_text())
    asked, most = container["resources"]["requests"], container["resources"]["limits"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    holds = {
        "memory": asked["memory"] == most["memory"],
        "gpus": most.get("nvidia.com/gpu", "0") == gpus,
        "restarts": pod["restartPolicy"] == "Never",
        "user": pod["securityContext"]["runAsNonRoot"],
        "claim": volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"],
        "access": claim["spec"]["accessModes"] == ["ReadWriteMany"],
        "mount": mounts == {"/data": volume["name"]},
        "image": container["image"] == "terravox:0.1.0-cuda",
    }
    yield from (fault for fault, right in holds.items() if not right)


def test_the_rayjob_has_its_required_fields():
    """The operator would refuse it, or a retry, a lost node or a full card would cost the run."""
    assert list(rayjob_faults(yaml.safe_load(RAYJOB.read_text()))) == []


GPU_MOST = "        maxReplicas: 4"


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("rayVersion: 2.60.0", "rayVersion: 2.59.0", "rayVersion"),
        ('num-cpus: "0"', 'num-cpus: "1"', "head"),
        ("backoffLimit: 2", "backoffLimit: 0", "retries"),
        ("ttlSecondsAfterFinished: 300", "deletionStrategy: {}", "cleaning up"),
        ('limits: {cpu: "2", memory: 8Gi}', 'limits: {cpu: "2", memory: 9Gi}', "memory"),
        ("terravox batch", "terravox segment", "entrypoint"),
        (f"0\n{GPU_MOST}", f"1\n{GPU_MOST}", "gpu group from zero"),
        ("mode: token", "mode: none", "authOptions"),
        ("terravox:0.1.0-cuda", "terravox:latest", "image"),
    ],
)
def test_the_check_of_the_rayjob_sees_a_planted_error(old, new, fault):
    """A check that finds nothing would pass anything."""
    text = RAYJOB.read_text()
    assert old in text
    assert fault in set(rayjob_faults(yaml.safe_load(text.replace(old, new, 1))))
