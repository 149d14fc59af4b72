"""The two readers of a bundle, Python's and the C++ host's, have one verdict on every bundle of `bundle_cases.py`."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest
from bundle_cases import CASES, FIELDS, Damage, link_copy, with_field
from host import HostBundle, HostError, Library, build_host

from hst_trt.backends import open_bundle
from hst_trt.bundle import strict_json
from hst_trt.errors import HstError
from hst_trt.tokenizer import PromptTokenizer

Verdict = Callable[[Path], tuple[int, str]]


def python_verdict(path: Path) -> tuple[int, str]:
    """The exit code and the message of opening a bundle to run it, as far as the C++ host does that before it has a backend."""
    try:
        bundle = open_bundle(path)
        for entry in bundle.manifest.tokenizers:
            PromptTokenizer(bundle.read(entry.path), PurePosixPath(entry.path).stem, entry.length, entry.pad_id)
    except HstError as exc:
        return exc.exit_code, str(exc)
    return 0, ""


@pytest.fixture(scope="module", params=["python", "host"])
def verdict(request: pytest.FixtureRequest) -> Verdict:
    if request.param == "python":
        return python_verdict
    library = Library(build_host() / "libhst_trt.so")

    def host_verdict(path: Path) -> tuple[int, str]:
        try:
            HostBundle(library, path)
        except HostError as exc:
            return exc.code, str(exc)
        return 0, ""

    return host_verdict


@pytest.fixture
def damaged(tiny_bundle: Path, tmp_path: Path) -> Iterator[Callable[[Damage], Path]]:
    """Makes bundles that something was done to."""
    numbers = itertools.count()

    def make(damage: Damage) -> Path:
        bundle = link_copy(tiny_bundle, tmp_path / str(next(numbers)) / "tiny-cpu.hstb")
        damage(bundle)
        return bundle

    return make


@pytest.mark.parametrize("name", CASES)
def test_a_bundle_opens_or_is_refused_with_its_code(verdict: Verdict, damaged: Callable[[Damage], Path], name: str) -> None:
    damage, expected = CASES[name]
    code, message = verdict(damaged(damage))
    assert code == expected, message
    assert not code or "\nto do: " in message


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_is_missing_or_of_another_type_is_refused(
    verdict: Verdict, damaged: Callable[[Damage], Path], field: str
) -> None:
    place, required, wrong = FIELDS[field]
    if isinstance(place[-1], str):  # a shorter array is another matter
        assert verdict(damaged(with_field(place)))[0] == (6 if required else 0)
    accepted = [value for value in wrong if verdict(damaged(with_field(place, value)))[0] != 6]
    assert not accepted


def test_a_folder_that_is_not_there_is_4(verdict: Verdict, tmp_path: Path) -> None:
    (tmp_path / "a-file.hstb").write_text("")
    for path in (tmp_path / "nothing.hstb", tmp_path / "a-file.hstb", tmp_path / "a-file.hstb" / "inner"):
        code, message = verdict(path)
        assert (code, "there is no bundle" in message) == (4, True)


def test_a_bundle_that_is_reached_by_a_link_opens(verdict: Verdict, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link.hstb").symlink_to(tiny_bundle)
    assert verdict(tmp_path / "link.hstb") == (0, "")


def test_a_file_that_changes_while_a_bundle_is_opened_is_never_read_unchecked(
    verdict: Verdict, damaged: Callable[[Damage], Path]
) -> None:
    """The scheduler becomes another one over and over: opening finds the one that was built, or refuses it as damaged (6), and
    never takes the other for the one that was hashed (which would be 3)."""
    bundle = damaged(lambda bundle: None)
    file, stop = bundle / "scheduler.json", threading.Event()
    good, other = file.read_bytes(), b'{"_class_name": "EulerDiscreteScheduler"}'

    def swap() -> None:
        while not stop.is_set():
            for content in (other, good):
                part = file.with_name("part")
                part.write_bytes(content)
                part.replace(file)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        codes = {verdict(bundle)[0] for _ in range(60)}
    finally:
        stop.set()
        thread.join()
    assert codes <= {0, 6}


# -- the JSON that both read ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, -0, 2.5e1, true, null, "\\u00e9\\ud83d\\udc27"]}', {"a": [1, 0, 25.0, True, None, "é🐧"]}),
        ("[" * 200 + "]" * 200, None),
        (str(2**63 - 1), 2**63 - 1),
    ],
    ids=["all kinds", "200 levels", "the largest number"],
)
def test_strict_json_reads_json(text: str, value: object) -> None:
    parsed = strict_json.parse(text.encode())
    assert value is None or parsed == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 201 + "]" * 201, "too many levels"),
        ("[" * 10**6, "too many levels"),
        ('{"a": 1, "a": 1}', "'a' stands twice"),
        ('"\\ud800"', "surrogates not allowed"),
        ('{"\\udc00": 1}', "surrogates not allowed"),
        ("1e400", "1e400 is out of range"),
        ("1e-400", "1e-400 is out of range"),
        (str(2**63), "is out of range"),
        ("-Infinity", "-Infinity is no number"),
        ("\ufeff{}", "BOM"),
    ],
    ids=lambda value: value[:20],
)  # fmt: skip
def test_strict_json_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strict_json.parse(text.encode())
