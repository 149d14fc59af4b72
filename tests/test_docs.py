"""The documents stay true: commands, options, links, paths, schemas and the bundle format are compared with the code."""

from __future__ import annotations

import ast
import re
import shlex
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest
from pydantic import BaseModel

from hst_trt import errors
from hst_trt.bundle import Manifest
from hst_trt.cli.main import cli
from hst_trt.export.glue import glue_graphs, join_text_graph
from hst_trt.plan import Schedule
from hst_trt.recipe import target_names
from hst_trt.tensor_names import GLUE, TEXT_ENCODERS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "docker/*.md", "demo/*.md", "engines/README.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
)
COMMANDS = cli.list_commands(click.Context(cli))
CODE_ROOTS = "hst_trt|tests|scripts|demo|benchmarks|docker|build/recipes|build/targets"


# -- reading Markdown ----------------------------------------------------------------------------------------------------
@cache
def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def code_lines(document: str) -> Iterator[str]:
    """Every line of a code block, continued lines joined, and every code span."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", read(document), re.S | re.M)
    for block in blocks:
        yield from re.sub(r"\\\n\s*", " ", block).splitlines()
    yield from code_spans(document)


def code_spans(document: str) -> list[str]:
    prose = re.sub(r"^```.*?^```", "", read(document), flags=re.S | re.M)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def headings(document: str) -> set[str]:
    """Anchors as the usual Markdown viewers make them."""
    texts = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", read(document), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-") for text in texts}


# -- commands ------------------------------------------------------------------------------------------------------------
def command_lines(document: str) -> list[str]:
    lines = (line.strip().removeprefix("$ ") for line in code_lines(document))
    return [line for line in lines if re.match(r"(\.venv/bin/)?hst-trt( [a-z]|$)", line)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_in_a_document_parses(document: str) -> None:
    for line in command_lines(document):
        words = shlex.split(line, comments=True)[1:]
        context = cli.make_context("hst-trt", list(words), resilient_parsing=not words)
        if not words:
            continue
        name, command, rest = cli.resolve_command(context, words)
        assert command is not None, f"{document}: {line}"
        try:
            command.make_context(name, list(rest), parent=context)
        except click.ClickException as exc:
            pytest.fail(f"{document}: `{line}`: {exc.format_message()}")
        except click.exceptions.Exit:
            assert "--help" in rest, f"{document}: {line}"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_page_names_every_option_of_every_command(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert f"hst-trt {name}" in read("docs/cli.md")
    spans = " ".join(code_spans("docs/cli.md"))
    for parameter in command.params:
        for flag in [*parameter.opts, *parameter.secondary_opts]:
            if flag.startswith("-"):
                assert re.search(rf"(^|\s){re.escape(flag)}(\s|$)", spans), f"docs/cli.md lacks {flag} of hst-trt {name}"


def test_the_command_line_page_names_no_option_that_no_command_has() -> None:
    known = {"-h", "--help", "--version"}
    for command in [cli, *(cli.get_command(click.Context(cli), name) for name in COMMANDS)]:
        assert command is not None
        known |= {flag for parameter in command.params for flag in parameter.opts}
    named = {word for span in code_spans("docs/cli.md") for word in span.split() if re.match(r"--?[a-z]", word)}
    assert named <= known


def test_the_command_line_page_names_every_schedule_target_and_json_schema() -> None:
    page = read("docs/cli.md")
    for name in (*typing.get_args(Schedule), *target_names()):
        assert f"`{name}`" in page, name
    schemas = {
        schema
        for file in (ROOT / "hst_trt" / "cli").glob("*.py")
        for schema in re.findall(r'"(hst_trt\.\w+/\d+)"', file.read_text())
    }
    assert schemas == set(re.findall(r"`(hst_trt\.\w+/\d+)`", page))


def test_the_table_of_exit_codes_is_the_tree_of_errors() -> None:
    rows = dict(re.findall(r"^\| (\d+) \|.*\| `(\w+)` \|$", read("docs/cli.md"), re.M))
    kinds = {name: getattr(errors, name) for name in errors.__all__}
    tree = {name: kind.exit_code for name, kind in kinds.items() if errors.HstError in kind.__bases__}
    assert {name: int(code) for code, name in rows.items()} == tree


# -- links, paths, chores ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_relative_link_leads_to_a_file_and_a_heading(document: str) -> None:
    prose = re.sub(r"`[^`]*`", "", re.sub(r"^```.*?^```", "", read(document), flags=re.S | re.M))
    for target in re.findall(r"\]\(<?([^)\s>]+)>?\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists(), f"{document} links to {target}, which is not there"
        if anchor and file.suffix == ".md":
            assert anchor in headings(file.resolve().relative_to(ROOT).as_posix()), f"{document}: {target} has no such heading"


@cache
def defined_names(path: Path) -> frozenset[str]:
    """Top-level names of a module, and Class.member."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for name in _names_of(node):
            names.add(name)
            if isinstance(node, ast.ClassDef):
                names |= {f"{name}.{member}" for inner in node.body for member in _names_of(inner)}
    return frozenset(names)


def _names_of(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [node.target.id] if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_and_name_in_backticks_is_in_the_code(document: str) -> None:
    for span in code_spans(document):
        if found := re.fullmatch(rf"((?:{CODE_ROOTS})/[\w./-]*)(?::([\w.]+))?", span):
            path, name = ROOT / found[1], found[2]
            assert path.exists(), f"{document}: `{span}` is not there"
            assert name is None or name in defined_names(path), f"{document}: {found[1]} has no {name}"
        elif found := re.fullmatch(r"hst_trt((?:\.\w+)+)", span):
            assert _is_dotted_name(found[1].strip(".").split(".")), f"{document}: `{span}` is not there"


def _is_dotted_name(parts: list[str]) -> bool:
    for split in range(len(parts), 0, -1):
        module = ROOT.joinpath("hst_trt", *parts[:split])
        if module.is_dir():
            module /= "__init__"
        if module.with_suffix(".py").is_file():
            name = ".".join(parts[split:])
            return not name or name in defined_names(module.with_suffix(".py"))
    return ".".join(parts) in defined_names(ROOT / "hst_trt" / "__init__.py")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_chore_in_a_document_is_in_the_makefile(document: str) -> None:
    chores = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {found[1] for line in code_lines(document) if (found := re.match(r"\s*(?:\$ )?make ([a-z-]+)", line))}
    assert named <= chores


def test_the_contributors_page_lists_every_chore() -> None:
    chores = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M))
    assert {f"make {chore}" for chore in chores} <= set(code_spans("CONTRIBUTING.md"))


# -- the bundle format ---------------------------------------------------------------------------------------------------
def test_the_format_page_names_every_field_of_the_manifest() -> None:
    spans = set(code_spans("engines/README.md"))
    for model in _models(Manifest):
        missing = [name for name in model.model_fields if name not in spans]
        assert not missing, f"engines/README.md lacks {', '.join(missing)} of {model.__name__}"


def _models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for part in [field.annotation, *typing.get_args(field.annotation)]:
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _models(part)


def test_the_format_page_names_every_graph_with_its_inputs_and_outputs() -> None:
    rows = re.findall(r"^\| (`\w+`[^|]*) \| ([^|]*) \| ([^|]*) \|$", read("engines/README.md"), re.M)
    table = {name: row for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert {*GLUE, *TEXT_ENCODERS, "vae_decoder", "small", "large"} <= table.keys()
    graphs = glue_graphs() | {"join_text": join_text_graph((4, 4), (4, 4), 16, 5, 5, True)}
    for name, graph in graphs.items():
        for names, cell in ((graph.input_names, table[name][1]), (graph.output_names, table[name][2])):
            assert re.findall(r"`(\w+)`", cell)[: len(names)] == names, f"engines/README.md: {name}"


# -- modules -------------------------------------------------------------------------------------------------------------
def test_no_module_imports_a_row_above_its_own() -> None:
    """The table of modules on the architecture page is a stack; this reads it and the imports."""
    section = read("docs/architecture.md").split("## Modules")[1].split("\n## ")[0]
    layer_of: dict[str, int] = {}
    for number, row in enumerate(re.findall(r"^\| ([^|]*hst_trt/[^|]*) \|", section, re.M)):
        for path in re.findall(r"`(hst_trt/[\w./]+)`", row):
            files = (ROOT / path).rglob("*.py") if path.endswith("/") else [ROOT / path]
            layer_of |= {file.relative_to(ROOT).with_suffix("").as_posix(): number for file in files}
    modules = {file.relative_to(ROOT).with_suffix("").as_posix() for file in (ROOT / "hst_trt").rglob("*.py")}
    assert modules - layer_of.keys() == {"hst_trt/__init__"}, "each module has its row"
    for module, layer in layer_of.items():
        for imported in _imports(module):
            assert layer_of.get(imported, layer) >= layer, f"{module} imports {imported}, which stands above it"


def _imports(module: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = "/".join([*module.split("/")[: -node.level], *(node.module.split(".") if node.module else [])])
            found |= {base, *(f"{base}/{alias.name}" for alias in node.names)}
    return found
