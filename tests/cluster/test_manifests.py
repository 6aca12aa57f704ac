"""docs/cluster.md and docs/container.md: field names are the published ones, flags and what is started exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedray.commands.cli import parse
from tests.zygote import launcher

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parent.parent.parent
CLUSTER_PAGE = (ROOT / "docs" / "cluster.md").read_text()
CONTAINER_PAGE = (ROOT / "docs" / "container.md").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def _names(text: str) -> set[str]:
    return set(text.split())


# Fields of the ray.io/v1 types, from "KubeRay CRD API reference" of KubeRay v1.6.2 (docs/reference/api.md at that tag).
# Only those that appear in it are allowed; the pod parts are those of the Kubernetes API reference v1.28.
RAY_JOB_SPEC = _names(
    "activeDeadlineSeconds backoffLimit rayClusterSpec submitterPodTemplate metadata clusterSelector submitterConfig managedBy "
    "deletionStrategy entrypoint runtimeEnvYAML jobId submissionMode entrypointResources entrypointNumCpus entrypointNumGpus "
    "ttlSecondsAfterFinished preRunningDeadlineSeconds shutdownAfterJobFinishes suspend"
)
RAY_CLUSTER_SPEC = _names(
    "upgradeStrategy authOptions suspend managedBy autoscalerOptions headServiceAnnotations enableInTreeAutoscaling "
    "gcsFaultToleranceOptions headGroupSpec rayVersion workerGroupSpecs"
)
AUTH_OPTIONS = {"enableK8sTokenAuth", "secretName", "mode"}
HEAD_GROUP_SPEC = _names("template headService enableIngress resources labels rayStartParams serviceType")
WORKER_GROUP_SPEC = _names(
    "suspend groupName replicas minReplicas maxReplicas idleTimeoutSeconds resources labels rayStartParams template "
    "scaleStrategy numOfHosts"
)
POD_SPEC = {"securityContext", "containers", "volumes"}
POD_SECURITY = {"runAsNonRoot", "runAsUser", "runAsGroup", "fsGroup"}
CONTAINER = {"name", "image", "resources", "volumeMounts"}
CLAIM_SPEC = {"accessModes", "resources"}


def _section(heading: str) -> str:
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", CLUSTER_PAGE, flags=re.DOTALL | re.MULTILINE)
    assert found, f"docs/cluster.md has no section {heading!r}"
    return found[1]


def _commands(page: str) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL)
    return [line.split(" #")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def _yaml(heading: str) -> list[Any]:
    block = re.search(r"```yaml\n(.*?)```", _section(heading), flags=re.DOTALL)
    assert block, f"section {heading!r} has no YAML"
    return list(yaml.safe_load_all(block[1]))


@pytest.fixture(scope="module")
def kinds() -> dict[str, Any]:
    """The documents of the Kubernetes manifest by kind."""
    return {document["kind"]: document for document in _yaml("Kubernetes")}


@pytest.fixture(scope="module")
def cluster(kinds: dict[str, Any]) -> Any:
    """The cluster that the job asks for."""
    return kinds["RayJob"]["spec"]["rayClusterSpec"]


def _groups(cluster: Any) -> Iterator[Any]:
    yield cluster["headGroupSpec"]
    yield from cluster["workerGroupSpecs"]


def test_rayjob_has_only_published_fields(kinds: dict[str, Any], cluster: Any) -> None:
    job = kinds["RayJob"]
    assert job["apiVersion"] == "ray.io/v1"
    assert set(job) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(job["spec"]) <= RAY_JOB_SPEC
    assert set(cluster) <= RAY_CLUSTER_SPEC
    assert set(cluster["authOptions"]) <= AUTH_OPTIONS
    assert set(cluster["headGroupSpec"]) <= HEAD_GROUP_SPEC
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= WORKER_GROUP_SPEC
    for group in _groups(cluster):
        pod = group["template"]["spec"]
        assert set(pod) <= POD_SPEC
        assert set(pod["securityContext"]) <= POD_SECURITY
        for container in pod["containers"]:
            assert set(container) <= CONTAINER
            assert container["resources"]["requests"] == container["resources"]["limits"]
    assert set(kinds["PersistentVolumeClaim"]["spec"]) <= CLAIM_SPEC


def test_rayjob_is_authenticated_resumable_and_goes_away(kinds: dict[str, Any], cluster: Any) -> None:
    spec = kinds["RayJob"]["spec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert tuple(int(part) for part in cluster["rayVersion"].split(".")) >= (2, 52, 0)  # older ones know no tokens
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] > 0
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert all(isinstance(text, str) for group in _groups(cluster) for text in group["rayStartParams"].values())


def test_rayjob_mounts_what_it_names(kinds: dict[str, Any], cluster: Any) -> None:
    claim = kinds["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in _groups(cluster):
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert set(mounts) == set(volumes)
        assert mounts["runs"] == "/runs"
        assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    head = cluster["headGroupSpec"]["template"]["spec"]
    config = next(volume["configMap"]["name"] for volume in head["volumes"] if "configMap" in volume)
    assert config == kinds["ConfigMap"]["metadata"]["name"]
    script = kinds["RayJob"]["spec"]["entrypoint"].split()[-1]
    assert Path(script).name in kinds["ConfigMap"]["data"]
    assert str(Path(script).parent) in {mount["mountPath"] for mount in head["containers"][0]["volumeMounts"]}


def test_rayjob_runs_as_the_images_user(cluster: Any) -> None:
    for group in _groups(cluster):
        user = group["template"]["spec"]["securityContext"]
        assert f"--uid {user['runAsUser']}" in DOCKERFILE
        assert f"--gid {user['fsGroup']}" in DOCKERFILE


@pytest.mark.slow
def test_rayjob_script_starts_then_resumes(kinds: dict[str, Any], tmp_path: Path) -> None:
    (script,) = kinds["ConfigMap"]["data"].values()
    small = "--pool inline --rounds 3 --local-steps 1 --samples-per-gateway 64 --batch-size 8"
    here = script.replace("/runs/", f"{tmp_path}/").replace("--gateways 16", f"--gateways 2 {small}")
    assert str(tmp_path) in here
    run = tmp_path / "sixteen"

    def attempt(text: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "run.sh").write_text(text)
        env = {**os.environ, "PATH": f"{Path(launcher()).parent}:{os.environ['PATH']}"}
        return subprocess.run(
            ["bash", "run.sh"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=300
        )

    stopped = attempt(here.replace("--rounds 3", "--rounds 3 --max-epsilon 0.0001"))
    assert stopped.returncode == 2  # bad input leaves nothing that a retry could mistake for a run
    assert not run.exists()
    assert attempt(here).returncode == 0
    model = (run / "model.safetensors").read_bytes()
    again = attempt(here)
    assert again.returncode == 0, again.stderr
    assert (run / "model.safetensors").read_bytes() == model
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


def _ray_start_flags() -> set[str]:
    from ray.scripts.scripts import start

    return {flag for parameter in start.params for flag in parameter.opts}


def test_ray_start_flags_exist(cluster: Any) -> None:
    known = _ray_start_flags()
    for group in _groups(cluster):
        assert {f"--{name}" for name in group["rayStartParams"]} <= known
    (up,) = _yaml("Machines reached by SSH")
    commands = [*up["head_start_ray_commands"], *up["worker_start_ray_commands"]]
    commands += [command for command in _commands(CLUSTER_PAGE) if command.startswith("ray start")]
    assert len(commands) >= 4
    for command in commands:
        given = {word.partition("=")[0] for word in shlex.split(command) if word.startswith("--")}
        assert given <= known, command


@pytest.mark.parametrize(
    ("page", "start", "number"),
    [(CLUSTER_PAGE, "python -m fedray ", 3), (CONTAINER_PAGE, r"docker run .*?fedray:\w+ ", 2)],
    ids=["cluster", "container"],
)
def test_flags_of_fedray_in_commands_exist(page: str, start: str, number: int) -> None:
    given = [match[1] for command in _commands(page) if (match := re.search(rf"{start}(.*)", command))]
    assert len(given) >= number
    for arguments in given:
        parse(shlex.split(arguments))


def test_ray_up_file_passes_rays_own_schema() -> None:
    import jsonschema
    import ray
    from ray.autoscaler._private.util import prepare_config

    (up,) = _yaml("Machines reached by SSH")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(up, schema)
    jsonschema.validate(prepare_config(up), schema)


def test_ray_up_file_hands_every_node_the_token() -> None:
    (up,) = _yaml("Machines reached by SSH")
    assert list(up["file_mounts"]) == ["/home/fedray/.ray/auth_token"]
    assert "RAY_AUTH_MODE=token" in DOCKERFILE
    assert "--entrypoint=/usr/bin/env" in up["docker"]["run_options"]  # Ray appends the command `bash`


def test_dockerfile_names_no_host_and_no_path_of_this_machine() -> None:
    words = re.sub(r"#.*", "", DOCKERFILE)
    assert "://" not in words
    assert not re.search(r"/(opt/wheels|opt/pypi|etc/xdg|root|home/(?!fedray))", words)
    assert "USER fedray" in words
    assert 'ENTRYPOINT ["python", "-m", "fedray"]' in words
