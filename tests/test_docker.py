"""The container image's rules, read from its Dockerfile: no engine is needed, and the rules cannot be forgotten."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

import hst_trt

ROOT = Path(__file__).resolve().parents[1]
NEEDED = {"LICENSE", "README.md", "constraints.txt", "pyproject.toml", "hst_trt", "build/recipes", "build/targets"}


def read_instructions() -> list[tuple[str, str]]:
    """(instruction, its arguments) in order, with continued lines joined and comments left out."""
    text = (ROOT / "docker" / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in joined)]


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    return read_instructions()


@pytest.fixture(scope="module")
def final_stage(instructions: list[tuple[str, str]]) -> list[tuple[str, str]]:
    last = max(i for i, (name, _) in enumerate(instructions) if name == "FROM")
    return instructions[last:]


@pytest.fixture(scope="module")
def service() -> dict:
    return yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]["hst-trt"]


def arguments_of(stage: list[tuple[str, str]], name: str) -> list[str]:
    return [rest for instruction, rest in stage if instruction == name]


def test_there_is_a_build_stage_and_a_runtime_stage_on_the_same_base(instructions: list[tuple[str, str]]) -> None:
    bases = [rest.split() for rest in arguments_of(instructions, "FROM")]
    assert [base[1:] for base in bases] == [["AS", "build"], []]
    assert bases[0][0] == bases[1][0]


def test_every_version_is_an_argument_and_none_is_latest(instructions: list[tuple[str, str]]) -> None:
    versions = dict(rest.split("=") for rest in arguments_of(instructions, "ARG"))
    assert set(versions) == {"PYTHON_VERSION", "DEBIAN_RELEASE", "HATCHLING_VERSION"}
    for base in arguments_of(instructions, "FROM"):
        image, _, tag = base.split()[0].partition(":")
        assert "/" not in image, "a base image is named without a host"
        assert not re.sub(r"\$\{(PYTHON_VERSION|DEBIAN_RELEASE)\}", "", tag).strip("-").replace("slim", "").strip("-")
    assert all("latest" not in rest for _, rest in instructions)
    assert re.fullmatch(r"3\.\d+\.\d+", versions["PYTHON_VERSION"])


def test_what_is_installed_is_pinned(instructions: list[tuple[str, str]]) -> None:
    installs = [step.strip() for run in arguments_of(instructions, "RUN") for step in run.split("&&") if "pip install" in step]
    assert len(installs) == 2
    for step in installs:
        assert "--constraint constraints.txt" in step or "==${" in step, step
        assert "--no-cache-dir" in step, step


def test_only_what_the_wheel_needs_is_copied_and_the_runtime_gets_the_environment_alone(
    instructions: list[tuple[str, str]], final_stage: list[tuple[str, str]]
) -> None:
    copied = [rest.split() for rest in arguments_of(instructions, "COPY")]
    sources = {source for words in copied if not words[0].startswith("--") for source in words[:-1]}
    assert sources == NEEDED
    assert all((ROOT / source).exists() for source in sources)
    assert arguments_of(final_stage, "COPY") == ["--from=build /opt/hst_trt /opt/hst_trt"]
    assert not arguments_of(instructions, "ADD")


def test_the_image_runs_hst_trt_as_a_user_that_is_not_root(final_stage: list[tuple[str, str]]) -> None:
    (user,) = arguments_of(final_stage, "USER")
    assert all(part.isdigit() and int(part) > 0 for part in user.split(":")), "by number, so that a cluster can check it"
    names = [name for name, _ in final_stage]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    (entry,) = arguments_of(final_stage, "ENTRYPOINT")
    assert json.loads(entry) == ["hst-trt"]


def test_bundles_and_pictures_are_volumes_below_the_folder_that_hst_trt_uses(final_stage: list[tuple[str, str]]) -> None:
    (variables,) = arguments_of(final_stage, "ENV")
    home = dict(pair.split("=", 1) for pair in variables.split())["HST_TRT_HOME"]
    (volumes,) = arguments_of(final_stage, "VOLUME")
    assert json.loads(volumes) == [f"{home}/bundles", f"{home}/outputs"]
    assert arguments_of(final_stage, "WORKDIR") == [home], "pictures go to ./outputs"


def test_the_build_context_is_a_list_of_what_is_needed() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == NEEDED
    assert rules[-1] == "**/__pycache__", "last, so that it holds below what was let in"


def test_compose_runs_this_version_with_no_rights_it_does_not_need(service: dict) -> None:
    assert service["image"] == f"hst-trt:{hst_trt.__version__}"
    assert (ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).resolve().is_file()
    assert service["read_only"] is True
    assert service["network_mode"] == "none"
    assert service["cap_drop"] == ["ALL"]
    assert "privileged" not in service
    assert {volume.split(":")[1] for volume in service["volumes"]} == {"/data/bundles", "/data/outputs"}


def test_the_documents_build_the_image_of_this_version() -> None:
    for name in ("Dockerfile", "README.md"):
        tags = set(re.findall(r"hst-trt:(\S+)", (ROOT / "docker" / name).read_text()))
        assert tags == {hst_trt.__version__}, name
