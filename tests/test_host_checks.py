"""The C++ host under sanitizers and fuzzers: no bad access, no undefined behaviour, no leak, no race, whatever it is given.

The library is loaded into Python as the other tests load it, so they all run once more, in a process that starts with the
address sanitizer. Each check is shown to find what was planted for it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from host import SOURCES, build_host, onnxruntime_library
from tokenizers import Tokenizer

CORPUS = SOURCES / "fuzz" / "corpus"
READERS = ("manifest", "tokenizer")
SECONDS = int(os.environ.get("HST_TRT_FUZZ_SECONDS", "60"))
TESTS = tuple(f"tests/test_{name}.py" for name in ("host", "host_api", "host_tensorrt", "host_tokenizers", "bundle_readers"))
# They run other programs, which leak by themselves: CMake and a compiler, and a Python without the host.
NOT_OURS = (
    "test_the_host_in_cpp_is_built_on_the_installed_library_and_draws",
    "test_an_installed_host_is_found_by_cmake",
    "test_the_host_in_python_draws",
    "_on_the_page_runs",
    "_of_the_page_runs",
)
DROPPED_ERROR = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
for _ in range(10):
    library.hst_bundle_open(None, None)
"""


def in_address_sanitizer(*arguments: object, logs: Path, built: Path, **bundles: Path) -> subprocess.CompletedProcess[str]:
    """Python with the sanitized library, and bundles that are built already. Its reports are files in `logs`.

    The runtimes of the sanitizer and of C++ come first, because Python has neither and loads our library late.
    """
    runtimes = [
        subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": f"detect_leaks=1:exitcode=0:log_path={logs / 'log'}",  # what leaks elsewhere is no failure
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "HST_TRT_TEST_HOST": str(built),
        **{f"HST_TRT_TEST_{name.upper()}": str(path) for name, path in bundles.items()},
    }
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=SOURCES.parents[1])


def our_reports(logs: Path) -> list[str]:
    """What the sanitizer says of the host. Python and its extensions leave memory behind when they end; that is not ours."""
    reports = []
    for log in logs.iterdir():
        for part in re.split(r"\n\n", log.read_text(errors="replace")):
            if "ERROR: AddressSanitizer" in part or "runtime error" in part or (" leak of " in part and "hst_trt" in part):
                reports.append(part)
    return reports


@pytest.mark.slow
def test_all_tests_of_the_host_pass_with_the_address_and_undefined_behaviour_sanitizers(
    tiny_bundle: Path, engine_bundle: Path, tmp_path: Path
) -> None:
    built = build_host("sanitize")
    others = " and ".join(f"not {test}" for test in NOT_OURS)
    command = ("-m", "pytest", "-q", *TESTS, "-m", "not slow", "-k", f"not [python and {others}")
    done = in_address_sanitizer(*command, logs=tmp_path, built=built, bundle=tiny_bundle, engines=engine_bundle)
    assert re.search(r"^\d{3,} passed", done.stdout, re.MULTILINE), done.stdout[-4000:] + done.stderr[-4000:]
    assert " failed" not in done.stdout
    assert our_reports(tmp_path) == []


@pytest.mark.slow
def test_a_leak_in_the_library_is_found(tiny_bundle: Path, tmp_path: Path) -> None:
    built = build_host("sanitize")
    in_address_sanitizer("-c", DROPPED_ERROR, built / "libhst_trt.so", logs=tmp_path, built=built, bundle=tiny_bundle)
    reports = our_reports(tmp_path)
    assert "make_error" in reports[0]


def threads(built: Path, bundle: Path, planted: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HST_ONNXRUNTIME": str(onnxruntime_library()),
        "TSAN_OPTIONS": f"suppressions={SOURCES / 'tests' / 'thread.supp'}",
    }
    command = [built / "hst-trt-threads", bundle, planted]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "planted", "found"), [
    ("thread", "race", "ThreadSanitizer: data race"), ("sanitize", "leak", "LeakSanitizer: detected memory leaks"),
])  # fmt: skip
def test_four_pipelines_at_once_have_no_race_and_no_leak_where_a_planted_one_is_found(
    tiny_bundle: Path, preset: str, planted: str, found: str
) -> None:
    built = build_host(preset)
    clean = threads(built, tiny_bundle)
    assert (clean.returncode, clean.stderr) == (0, "")
    assert "4 pipelines drew" in clean.stdout
    spoilt = threads(built, tiny_bundle, planted)
    assert spoilt.returncode != 0
    assert found in spoilt.stderr


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_a_reader_takes_whatever_a_fuzzer_gives_it(reader: str, tmp_path: Path) -> None:
    fuzzer = build_host("fuzz") / "fuzz" / f"hst-trt-fuzz-{reader}"
    options = [f"-max_total_time={SECONDS}", "-max_len=8192", "-timeout=10", f"-artifact_prefix={tmp_path}/"]
    (tmp_path / "found").mkdir()
    command = [fuzzer, f"-dict={SOURCES / 'fuzz' / 'json.dict'}", *options, tmp_path / "found", CORPUS / reader]
    done = subprocess.run(command, capture_output=True, text=True, check=False, errors="replace")
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(re.findall(r"Done (\d+) runs", done.stderr)[0]) > 1000
    assert len(list((tmp_path / "found").iterdir())) > 20, "new paths were found, so the corpus and the counters are alive"


@pytest.mark.parametrize("reader", READERS)
def test_the_corpus_of_a_reader_is_read_where_there_is_no_fuzzer_too(reader: str) -> None:
    program = build_host() / "fuzz" / f"hst-trt-fuzz-{reader}"
    done = subprocess.run([program, CORPUS / reader], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{len(list((CORPUS / reader).iterdir()))} inputs\n"), done.stderr


@pytest.mark.parametrize("name", ["good-bpe", "good-unigram"])
def test_the_corpus_has_tokenizers_that_are_read_to_their_end(name: str) -> None:
    file, _, text = (CORPUS / "tokenizer" / name).read_bytes().partition(b"\0")
    assert len(Tokenizer.from_buffer(file).encode(text.decode()).ids) > 4
