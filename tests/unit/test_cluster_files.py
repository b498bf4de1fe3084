"""The Kubernetes and SLURM files against schemas: what KubeRay would drop, or sbatch does not know, is found."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.source import ROOT

CLUSTER = ROOT / "examples" / "cluster"
TEXT, WHOLE, TRUTH = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
QUANTITY = {"anyOf": [{"type": "string", "pattern": r"^\d+(\.\d+)?(m|[KMGTP]i?)?$"}, WHOLE]}


def record(required: str = "", **fields: Any) -> dict[str, Any]:
    """An object with these fields and no others, as Kubernetes drops what it does not know."""
    closed = {"type": "object", "additionalProperties": False, "required": required.split()}
    return closed | {"properties": {name.replace("__", "-"): schema for name, schema in fields.items()}}


def table(values: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": values}


def rows(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


# Of the CustomResourceDefinition ray.io_rayjobs.yaml, version v1, of KubeRay 1.5, and Kubernetes' own PodSpec: what the example
# uses and what its readers are likely to add.
CONTAINER = record(
    "name image resources",
    name=TEXT,
    image=TEXT,
    imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    securityContext=record(
        allowPrivilegeEscalation=TRUTH, capabilities=record(add=rows(TEXT), drop=rows(TEXT)), runAsUser=WHOLE
    ),
    env=rows(record("name", name=TEXT, value=TEXT, valueFrom=table({}))),
    resources=record("limits", requests=table(QUANTITY), limits=table(QUANTITY)),
    volumeMounts=rows(record("name mountPath", name=TEXT, mountPath=TEXT, readOnly=TRUTH, subPath=TEXT)),
)
VOLUME = record(
    "name",
    name=TEXT,
    persistentVolumeClaim=record("claimName", claimName=TEXT, readOnly=TRUTH),
    emptyDir=record(medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY),
)
POD = record(
    "containers",
    securityContext=record(runAsNonRoot=TRUTH, runAsUser=WHOLE, runAsGroup=WHOLE, fsGroup=WHOLE),
    hostNetwork=TRUTH,
    dnsPolicy={"enum": ["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"]},
    nodeSelector=table(TEXT),
    tolerations=rows(table({})),
    containers=rows(CONTAINER),
    volumes=rows(VOLUME),
)
TEMPLATE = record("spec", metadata=table({}), spec=POD)
GROUP = record(
    "groupName template",
    groupName=TEXT,
    replicas=WHOLE,
    minReplicas=WHOLE,
    maxReplicas=WHOLE,
    rayStartParams=table(TEXT),
    template=TEMPLATE,
)
CLUSTER_SPEC = record(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=record(mode={"enum": ["disabled", "token"]}, secretName=TEXT, enableK8sTokenAuth=TRUTH),
    headGroupSpec=record(
        "template",
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        rayStartParams=table(TEXT),
        template=TEMPLATE,
    ),
    workerGroupSpecs=rows(GROUP),
)
RAY_JOB = record(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=record("name", name=TEXT, namespace=TEXT, labels=table(TEXT)),
    spec=record(
        "entrypoint rayClusterSpec",
        entrypoint=TEXT,
        shutdownAfterJobFinishes=TRUTH,
        ttlSecondsAfterFinished=WHOLE,
        activeDeadlineSeconds=WHOLE,
        backoffLimit=WHOLE,
        suspend=TRUTH,
        rayClusterSpec=CLUSTER_SPEC,
    ),
)
# Options of sbatch by their long names, and what they take.
SBATCH = {
    "job-name": r"[\w.-]+",
    "nodes": r"\d+(-\d+)?",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"(\w+:)?\d+",
    "cpus-per-task": r"\d+",
    "mem": r"\d+[KMGT]?",
    "time": r"(\d+-)?\d+(:\d\d){0,2}",
    "output": r"[\w./%-]+",
    "partition": r"[\w,-]+",
    "account": r"[\w-]+",
    "exclusive": "",
}


def faults(job: dict[str, Any]) -> Iterator[str]:
    Draft202012Validator.check_schema(RAY_JOB)
    for error in Draft202012Validator(RAY_JOB).iter_errors(job):
        yield f"{'/'.join(map(str, error.path))}: {error.message}"


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())
    return loaded


def test_the_ray_job_has_the_fields_of_its_schema(job: dict[str, Any]) -> None:
    assert list(faults(job)) == []


def test_the_schema_finds_what_kubernetes_would_drop(job: dict[str, Any]) -> None:
    wrong = copy.deepcopy(job)
    wrong["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replica"] = 2
    wrong["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-gpus"] = 0
    assert sorted(fault.split(":")[0] for fault in faults(wrong)) == [
        "spec/rayClusterSpec/headGroupSpec/rayStartParams/num-gpus",
        "spec/rayClusterSpec/workerGroupSpecs/0",
    ]


def test_shared_memory_of_the_pods_is_memory_and_within_their_limit(job: dict[str, Any]) -> None:
    """An emptyDir of memory counts towards the limit of the container; without one a pod has 64 MiB."""
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        shared = next(volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == mounted["/dev/shm"])
        assert shared["medium"] == "Memory"
        limit = container["resources"]["limits"]["memory"]
        assert int(shared["sizeLimit"].removesuffix("Gi")) < int(limit.removesuffix("Gi"))


@pytest.mark.parametrize("name", ["slurm_rl.sh", "slurm_train.sh"])
def test_the_options_of_sbatch_are_its_own(name: str) -> None:
    text = (CLUSTER / name).read_text()
    given = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert len(given) == len(re.findall("^#SBATCH", text, re.MULTILINE)), "an option twice, or one that is not read"
    for option, value in given.items():
        assert re.fullmatch(SBATCH[option], value), f"--{option}={value}"
    assert given["ntasks-per-node"] == "1", "Ray and torchrun start the processes of a node"
    # sbatch reads them only above the first command
    assert text.rindex("#SBATCH --") < text.index("\nset -euo pipefail")
