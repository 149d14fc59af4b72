"""The images' rules, checked in the Dockerfile, the compose file and their page: no engine is needed, and no rule is forgotten.

A rule about the Dockerfile is a function of its text, so that it can also be shown a Dockerfile that breaks it.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import yaml
from test_docs import code_lines, code_spans

import hst_trt
from hst_trt.cli.main import cli
from hst_trt.tensorrt_module import _OLDEST, EXTRAS

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
IMAGES = {"cpu", "runtime", "build"}
EXPORT_ONLY = {"torch", "diffusers", "transformers", "onnx", "accelerate"}


# -- reading ---------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Stage:
    """A stage with the steps of all that it stands on, the oldest first: (instruction, its arguments)."""

    name: str
    base: str
    steps: tuple[tuple[str, str], ...]

    def all(self, instruction: str) -> list[str]:
        return [arguments for name, arguments in self.steps if name == instruction]

    def last(self, instruction: str) -> str:
        return ([""] + self.all(instruction))[-1]

    @property
    def environment(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for line in self.all("ENV") for pair in shlex.split(line))


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, its arguments) in order, with continued lines joined and comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in joined)]


def stages(text: str) -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    name = ""
    for instruction, arguments in instructions(text):
        if instruction == "FROM":
            base, _, name = arguments.partition(" AS ")
            found[name] = Stage(name, base, found[base].steps if base in found else ())
        elif name:
            found[name] = Stage(name, found[name].base, (*found[name].steps, (instruction, arguments)))
    return found


def build_arguments(text: str) -> dict[str, str]:
    return dict(arguments.partition("=")[::2] for name, arguments in instructions(text) if name == "ARG")


def filled_in(text: str, values: dict[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda found: values[found[1]], text)


def pins() -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return dict(line.split("==") for line in lines if line)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def distributions(requirements: str) -> set[str]:
    return {canonical(re.match(r"[\w.-]+", line)[0]) for line in requirements.splitlines()}  # type: ignore[index]


@pytest.fixture(scope="module")
def requirement_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """What the Dockerfile's own script writes: names of distributions, by file."""
    folder = tmp_path_factory.mktemp("requirements")
    runpy.run_path(str(DOCKER / "requirements.py"))["main"](ROOT / "pyproject.toml", folder)
    return {path.name: distributions(path.read_text()) for path in folder.iterdir()}


# -- the Dockerfile --------------------------------------------------------------------------------------------------------
Rule = Callable[[str], None]


def hadolint_finds_nothing(text: str) -> None:
    command = [str(Path(sys.executable).with_name("hadolint")), "--failure-threshold", "style", "--no-color", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def images_start_as_hst_trt_and_not_as_root(text: str) -> None:
    for image in IMAGES:
        stage = stages(text)[image]
        user = stage.last("USER")
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), f"{image}: by number, so that a cluster can check it"
        assert f"--uid {user.split(':')[0]} " in stage.all("RUN")[0]
        assert [name for name, _ in stage.steps].index("USER") > max(
            i for i, (name, _) in enumerate(stage.steps) if name == "RUN"
        )
        assert json.loads(stage.last("ENTRYPOINT")) == ["hst-trt"]
        assert_parses(json.loads(stage.last("CMD")))


def bases_are_one_pinned_image_without_a_host(text: str) -> None:
    known = stages(text)
    outside = {stage.base for stage in known.values() if stage.base not in known}
    assert len(outside) == 1
    image = outside.pop()
    assert image == "python:${PYTHON_VERSION}-slim-${DEBIAN_RELEASE}"
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", filled_in(image, build_arguments(text)))


def versions_are_those_of_the_project(text: str) -> None:
    versions = build_arguments(text)
    assert set(versions) == {"PYTHON_VERSION", "DEBIAN_RELEASE", "TENSORRT_VERSION", "GPU_EXTRA"}
    for name in versions:
        assert f"${{{name}}}" in text, f"{name} is not used"
    seen = re.search(r"CPython (\d+\.\d+)", (ROOT / "constraints.txt").read_text())
    assert seen is not None
    assert versions["PYTHON_VERSION"].startswith(f"{seen[1]}."), "constraints.txt was seen to work with this Python"
    for name in ("tensorrt-cu13", "tensorrt-cu13-bindings", "tensorrt-cu13-libs"):
        assert pins()[name] == versions["TENSORRT_VERSION"]
    assert tuple(map(int, versions["TENSORRT_VERSION"].split(".")[:2])) >= _OLDEST["tensorrt"]
    assert versions["GPU_EXTRA"] == EXTRAS["tensorrt"]


def installs_are_constrained(text: str) -> None:
    runs = [arguments for name, arguments in instructions(text) if name == "RUN"]
    installs = [step for run in runs for step in run.split("&&") if "install" in step and "pip" in step]
    assert len(installs) == 5
    for step in installs:
        assert "constraints.txt" in step or "--no-deps --no-build-isolation" in step, step
    assert not any(tool in run for run in runs for tool in ("curl", "wget", "apt-get", "git ", "http")), "pip alone fetches"


def only_the_build_image_has_what_exports(text: str) -> None:
    for image in IMAGES:
        named = {
            name
            for arguments in stages(text)[image].all("RUN")
            for name in re.findall(r"--requirement \"?/requirements/(\S+?)\.txt", filled_in(arguments, build_arguments(text)))
        }
        served = {"run", "serve"}
        expected = {"cpu": served, "runtime": served | {"tensorrt"}, "build": served | {"tensorrt", "export"}}
        assert named == expected[image], image


def the_servers_port_is_named(text: str) -> None:
    (option,) = (option for option in cli.get_command(click.Context(cli), "serve").params if option.name == "port")  # type: ignore[union-attr]
    assert stages(text)["base"].all("EXPOSE") == [str(option.default)]


def stages_use_files_that_another_has_made(text: str) -> None:
    """What a stage copies from another one, or installs, is there."""
    for stage in stages(text).values():
        copied = " ".join(filled_in(line, build_arguments(text)) for line in stage.all("COPY"))
        for run in stage.all("RUN"):
            for file in re.findall(r"(?:--requirement|--constraint) \"?(\S+\.txt)", filled_in(run, build_arguments(text))):
                assert file in copied, f"{stage.name}: {file}"
        for other in re.findall(r"--from=(\S+)", copied):
            assert other in stages(text)


def data_and_pictures_are_volumes_of_the_user(text: str) -> None:
    base = stages(text)["base"]
    assert json.loads(base.last("VOLUME")) == ["/data", "/outputs"]
    assert base.environment["HST_TRT_HOME"] == "/data"
    assert base.environment["XDG_CACHE_HOME"] == "/data/cache", "the hub's cache and TensorRT's"
    assert re.search(r"install -d -o hst -g hst /data /data/bundles /data/cache /outputs$", base.all("RUN")[0])
    assert all(stages(text)[image].last("WORKDIR") == "/" for image in IMAGES), "pictures go to ./outputs"


def onnx_runtime_reports_to_nobody(text: str) -> None:
    assert stages(text)["base"].environment["ORT_DISABLE_TELEMETRY"] == "1"


def gpu_images_ask_for_cuda_and_nvidia_smi(text: str) -> None:
    for image in ("runtime", "build"):
        assert stages(text)[image].environment["NVIDIA_VISIBLE_DEVICES"] == "all"
        assert stages(text)[image].environment["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert "NVIDIA_VISIBLE_DEVICES" not in stages(text)["cpu"].environment


RULES: dict[Rule, list[tuple[str, str]]] = {  # a rule, and changes that it must notice
    hadolint_finds_nothing: [
        ("--constraint constraints.txt hatchling", "hatchling"),
        (" --no-cache-dir", ""),
        ("USER 10001:10001", "USER root"),
        ("python:${PYTHON_VERSION}-slim-${DEBIAN_RELEASE}", "python"),
        ("WORKDIR /src", "WORKDIR src"),
        ("COPY hst_trt hst_trt", "ADD hst_trt hst_trt"),
        ('CMD ["doctor"]', "CMD doctor"),
    ],
    images_start_as_hst_trt_and_not_as_root: [
        ("USER 10001:10001\n", ""),
        ("USER 10001:10001", "USER hst"),
        ("USER 10001:10001", "USER 10002:10002"),
        ('ENTRYPOINT ["hst-trt"]', 'ENTRYPOINT ["python"]'),
        ('"--gpu", "auto"', '"--gpus", "all"'),
    ],
    bases_are_one_pinned_image_without_a_host: [
        ("PYTHON_VERSION=3.11.15", "PYTHON_VERSION=3"),
        ("FROM python:", "FROM registry.example/python:"),
        ("FROM base AS package", "FROM debian:bookworm AS package"),
    ],
    versions_are_those_of_the_project: [
        ("PYTHON_VERSION=3.11.15", "PYTHON_VERSION=3.13.1"),
        ("TENSORRT_VERSION=11.4.0.106", "TENSORRT_VERSION=11.3.0.99"),
        ("${TENSORRT_VERSION}", "11.4.0.106"),
    ],
    installs_are_constrained: [
        ("--constraint /requirements/constraints.txt ", ""),
        (" hatchling", " hatchling && curl example.org"),
    ],
    only_the_build_image_has_what_exports: [
        ("FROM gpu-packages AS runtime", "FROM export-packages AS runtime"),
        ("FROM export-packages AS build", "FROM gpu-packages AS build"),
    ],
    the_servers_port_is_named: [("EXPOSE 8000", "EXPOSE 8080")],
    stages_use_files_that_another_has_made: [
        ("COPY --from=requirements /requirements/export.txt /requirements/\n", ""),
        ("--from=package", "--from=wheel"),
    ],
    data_and_pictures_are_volumes_of_the_user: [
        ('VOLUME ["/data", "/outputs"]', 'VOLUME ["/data"]'),
        ("XDG_CACHE_HOME=/data/cache", "XDG_CACHE_HOME=/cache"),
        ("install -d -o hst -g hst", "install -d"),
    ],
    onnx_runtime_reports_to_nobody: [("ORT_DISABLE_TELEMETRY=1", "ORT_DISABLE_TELEMETRY=0")],
    gpu_images_ask_for_cuda_and_nvidia_smi: [("compute,utility", "compute")],
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_dockerfile_keeps_to(rule: Rule) -> None:
    rule(DOCKERFILE)


@pytest.mark.parametrize(
    ("rule", "old", "new"), [(rule, *change) for rule, changes in RULES.items() for change in changes], ids=lambda value: ""
)
def test_a_dockerfile_that_breaks_a_rule_is_noticed(rule: Rule, old: str, new: str) -> None:
    assert old in DOCKERFILE
    with pytest.raises(AssertionError):
        rule(DOCKERFILE.replace(old, new))


def test_everything_that_an_image_asks_for_by_name_has_one_version(requirement_files: dict[str, set[str]]) -> None:
    asked = {"run.txt", "serve.txt", "export.txt", *(f"{extra}.txt" for extra in EXTRAS.values())}
    named = set().union(*(requirement_files[file] for file in asked)) | {"hatchling"}
    assert named <= {canonical(name) for name in pins()}


def test_what_a_run_needs_has_nothing_of_what_an_export_needs(requirement_files: dict[str, set[str]]) -> None:
    assert requirement_files["export.txt"] >= EXPORT_ONLY
    for file in ("run.txt", "serve.txt", *(f"{extra}.txt" for extra in EXTRAS.values())):
        assert not requirement_files[file] & EXPORT_ONLY, file


def test_the_requirement_files_say_what_pyproject_says(requirement_files: dict[str, set[str]]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert requirement_files["run.txt"] == distributions("\n".join(project["dependencies"]))
    assert {file.removesuffix(".txt") for file in requirement_files} == {"run", *project["optional-dependencies"]}


def test_another_tensorrt_can_be_asked_for_and_nothing_else_changes(tmp_path: Path) -> None:
    (command,) = (run for run in stages(DOCKERFILE)["requirements"].all("RUN") if run.startswith("sed"))
    (tmp_path / "constraints.txt").write_text((ROOT / "constraints.txt").read_text())
    subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env={"TENSORRT_VERSION": "10.15.1.29", "PATH": "/usr/bin:/bin"}, check=True
    )
    changed = set((tmp_path / "constraints.txt").read_text().split()) - set((ROOT / "constraints.txt").read_text().split())
    assert changed == {f"tensorrt-cu13{part}==10.15.1.29" for part in ("", "-bindings", "-libs")}


def test_the_build_context_is_what_the_dockerfile_copies() -> None:
    copies = [arguments.split() for name, arguments in instructions(DOCKERFILE) if name == "COPY"]
    copied = {source for words in copies if not words[0].startswith("--from=") for source in words[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied
    assert rules[-1] == "**/__pycache__", "last, so that it holds below what was let in"


# -- Compose ---------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def compose() -> dict:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


def test_the_compose_file_follows_the_schema_of_compose() -> None:
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        str(DOCKER / "compose.yaml"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


OURS = {"cpu", "build", "run", "serve", "serve-gpu"}
SERVERS = {"serve", "serve-gpu"}
OTHERS = {"prometheus", "grafana"}


def test_each_service_of_ours_builds_an_image_of_this_version_and_runs_a_command_that_parses(compose: dict) -> None:
    assert compose["services"].keys() == OURS | OTHERS
    targets = {}
    for name in OURS:
        service = compose["services"][name]
        build = service["build"]
        assert (DOCKER / build["context"] / build["dockerfile"]).resolve() == DOCKER / "Dockerfile"
        assert_parses(service["command"])
        assert targets.setdefault(build["target"], service["image"]) == service["image"], name
    assert targets == {target: tag_of(target) for target in IMAGES}


def test_images_of_others_have_one_version_and_no_host(compose: dict) -> None:
    for name in OTHERS:
        assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", compose["services"][name]["image"]), name
        assert "build" not in compose["services"][name]


def test_services_have_no_rights_that_they_do_not_need(compose: dict) -> None:
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "user", "pid", "ipc", "cap_add"} & service.keys(), name
    for name in OURS - SERVERS:
        assert compose["services"][name]["network_mode"] == ("bridge" if name == "build" else "none"), (
            "only the build asks the hub"
        )
    secrets = {name: service["secrets"] for name, service in compose["services"].items() if "secrets" in service}
    assert secrets == {"build": ["hf_token"]} | {name: ["api_keys"] for name in SERVERS}, "each knows what it needs"


def test_services_write_only_to_volumes_that_the_image_has(compose: dict) -> None:
    volumes = set(json.loads(stages(DOCKERFILE)["base"].last("VOLUME")))
    for name in OURS:
        for source, path, *mode in (volume.split(":") for volume in compose["services"][name]["volumes"]):
            assert source in compose["volumes"]
            assert path in volumes, name
            assert mode == (["ro"] if (name, path) in {("run", "/data"), ("serve-gpu", "/data")} else []), (
                "engines are only read"
            )


def test_others_read_files_of_this_folder_and_write_to_a_volume_of_their_own(compose: dict) -> None:
    for name in OTHERS:
        for source, _, *mode in (volume.split(":") for volume in compose["services"][name]["volumes"]):
            if source.startswith("./"):
                assert (DOCKER / source).exists(), source
                assert mode == ["ro"]
            else:
                assert source in set(compose["volumes"]) - {"data", "outputs"}, name


def test_the_gpus_services_reserve_one_gpu_and_do_not_start_by_themselves(compose: dict) -> None:
    for name in ("build", "run", "serve-gpu"):
        (device,) = compose["services"][name]["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "device_ids": ["${HST_GPU:-0}"], "capabilities": ["gpu"]}
    assert [name for name, service in compose["services"].items() if "profiles" not in service] == ["cpu"], "what `up` starts"
    assert "deploy" not in compose["services"]["cpu"], "on any host"


def test_what_listens_is_reached_from_this_host_only(compose: dict) -> None:
    published = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert published.keys() == SERVERS | OTHERS
    for name, ports in published.items():
        (port,) = ports
        assert re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port), name
        assert compose["services"][name]["networks"] == ["serving"], name


def test_servers_are_asked_whether_they_are_ready_and_have_time_to_drain(compose: dict) -> None:
    for name in SERVERS:
        service = compose["services"][name]
        (_, host, port, _) = re.split(r"//|:(?=\d)|(?<=\d)/", service["healthcheck"]["test"][-1], maxsplit=3)
        assert (host, f"{host}:{port}:{port}") == ("127.0.0.1", service["ports"][0])
        deadline = float(service["command"][service["command"].index("--deadline") + 1])
        assert float(service["stop_grace_period"].removesuffix("s")) > deadline, name


def test_the_keys_are_a_file_that_the_servers_are_pointed_to(compose: dict) -> None:
    for name in SERVERS:
        service = compose["services"][name]
        (secret,) = service["secrets"]
        command = service["command"]
        assert command[command.index("--api-key-file") + 1] == f"/run/secrets/{secret}"
        assert "environment" not in service, "a variable shows in `docker inspect`"
        assert compose["secrets"][secret] == {"file": "${HST_API_KEY_FILE:-/dev/null}"}


def test_the_token_is_a_file_that_the_hubs_library_is_pointed_to(compose: dict) -> None:
    service = compose["services"]["build"]
    (secret,) = service["secrets"]
    assert service["environment"] == {"HF_TOKEN_PATH": f"/run/secrets/{secret}"}
    assert compose["secrets"][secret] == {"file": "${HF_TOKEN_FILE:-/dev/null}"}


# -- the page --------------------------------------------------------------------------------------------------------------
def docker_lines() -> list[list[str]]:
    documents = [line for name in ("docker/README.md", "README.md") for line in code_lines(name)]
    comments = re.findall(r"^#\s+(docker .*)", DOCKERFILE, re.M)
    spans = re.findall(r"`(docker .*?)`", (DOCKER / "compose.yaml").read_text())
    lines = (re.sub(r"^(\$ )?([A-Z_]+=\S+ )*", "", line.strip()) for line in [*documents, *comments, *spans])
    return [shlex.split(line) for line in lines if re.match(r"docker (compose|build|run) ", line)]


def test_docker_commands_on_the_pages_name_services_images_and_commands_that_there_are(compose: dict) -> None:
    used = set()
    for words in docker_lines():
        if words[1] == "compose":
            assert words[2:4] == ["-f", "docker/compose.yaml"], words
            profiles = {profile for service in compose["services"].values() for profile in service.get("profiles", [])}
            if words[4] == "--profile":
                assert words[5] in profiles, words
                del words[4:6]
            subcommand, rest = words[4], [word for word in words[5:] if word != "--rm"]
            used.add(subcommand)
            if subcommand == "run":
                assert rest[0] in compose["services"], words
                assert_parses(rest[1:] or compose["services"][rest[0]]["command"])
            elif subcommand == "cp":
                assert rest[0].split(":")[0] in compose["services"], words
            elif subcommand == "build":
                assert rest[0] == "--build-arg"
                assert rest[1].split("=")[0] in build_arguments(DOCKERFILE), words
                assert set(rest[2:]) <= compose["services"].keys(), words
            else:
                assert (subcommand, rest) == ("up", []), words
        elif words[1] == "run":
            (at,) = (i for i, word in enumerate(words) if word.startswith("hst-trt:"))
            assert words[at] in {tag_of(image) for image in IMAGES}, words
            assert_parses(words[at + 1 :])
            used.add("docker run")
        elif "--target" in words:
            assert tag_of(words[words.index("--target") + 1]) == words[words.index("-t") + 1], words
            used.add("docker build")
    assert used == {"run", "cp", "build", "up", "docker run", "docker build"}


def test_the_page_tells_all_that_can_be_set(compose: dict) -> None:
    spans = {word for span in code_spans("docker/README.md") for word in (span, span.partition("=")[0])}
    variables = {
        "HF_TOKEN_PATH",
        "HST_GPU",
        "HF_TOKEN_FILE",
        "HST_API_KEY_FILE",
        "NVIDIA_VISIBLE_DEVICES",
        "NVIDIA_DRIVER_CAPABILITIES",
    }
    assert spans >= variables | set(build_arguments(DOCKERFILE)) | {"/data", "/outputs"} | {tag_of(image) for image in IMAGES}
    assert set(re.findall(r"\$\{(\w+)", (DOCKER / "compose.yaml").read_text())) <= variables


def test_versions_on_the_page_are_those_of_the_dockerfile() -> None:
    page = (DOCKER / "README.md").read_text()
    base = filled_in(stages(DOCKERFILE)["base"].base, build_arguments(DOCKERFILE))
    assert set(re.findall(r"python:3[\w.-]+", page)) == {base}
    for file in (page, DOCKERFILE, (DOCKER / "compose.yaml").read_text()):
        assert set(re.findall(r"hst-trt:(\d[\w.]*)", file)) == {hst_trt.__version__}


# -- helpers ---------------------------------------------------------------------------------------------------------------
def tag_of(image: str) -> str:
    return f"hst-trt:{hst_trt.__version__}" + ("" if image == "runtime" else f"-{image}")


def assert_parses(words: list[str]) -> None:
    """That `hst-trt` has this command with these options."""
    context = cli.make_context("hst-trt", list(words))
    try:
        name, command, rest = cli.resolve_command(context, list(words))
        assert command is not None
        command.make_context(name, list(rest), parent=context)
    except click.ClickException as exc:
        raise AssertionError(f"{' '.join(words)}: {exc.format_message()}") from exc
