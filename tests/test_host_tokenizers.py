"""The C++ host's tokenizers beside the `tokenizers` library: a file and a text give the same ids, or an error at once."""

from __future__ import annotations

import base64
import json
import random
import re
import resource
import struct
import subprocess
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import made_tokenizers
import numpy as np
import pytest
import tokenizers
from host import HostBundle, Library, build_host
from made_tokenizers import METASPACE, File, changed
from tokenizers import Tokenizer

from hst_trt.backends import open_bundle
from hst_trt.tokenizer import PromptTokenizer
from scripts.host_unicode import POINTS, TARGET, charsmap

WORDS = "a the red apple on blue background PENGUIN don't we'll it's 123 4K café naïve straße ΣΑΣ İstanbul 東京 🐧 ﬁn ①"
ODD = "<|startoftext|> <|ENDOFTEXT|> <|endoftext|> <pad> </s> <unk> ! !! 's ''s 'LL \u2581 \u2581\u2581 \u017f \u212a"
ADDED = "<extra_id_0> <extra_id_42> <extra_id_100> <concept> Σtyle στυλε cat x"
CLUSTERS = "👨\u200d👩\u200d👧 🏳\ufe0f\u200d🌈 🇩🇪🇫🇷🇺 क\u094dषि e\u0301\u0323 \u1100\u1161\u11a8 가\u11a8"
COMPATIBLE = "ﷺ ｶﾞ ก\u0e33 \u0600a \u00a8 ½ ㍿ ﬃ"
MARKS = [
    "\u0301",
    "\u0334",
    "\u200d",
    "\u200b",
    "\ufeff",
    "\xad",
    "\xa0",
    "\u3000",
    "\x1c",
    "\x85",
    "\r\n",
    "\t",
    "\x7f",
    "\0",
    "\1",
    "  ",
    " \t ",
]
RANGES = [
    (0, 127), (1, 0x24F), (0x300, 0x370), (0x370, 0x1FFF), (0x900, 0xDFF), (0x1100, 0x11FF), (0x2000, 0x2FFF), (0x3000, 0xD7FF),
    (0xE000, 0xFFFF), (0x10000, 0x10FFFF), (0x1F1E6, 0x1F1FF), (0x1F300, 0x1FAFF), (0xE0000, 0xE01FF),
]  # fmt: skip
ROBERTA = {"type": "RobertaProcessing", "sep": ["a", 1], "cls": ["b", 0], "trim_offsets": False, "add_prefix_space": False}


def texts(count: int, seed: int) -> list[str]:
    """Words as people write them, characters of all of Unicode, and what tokenizers treat in a way of their own."""
    chosen = random.Random(seed)
    words, odd = (
        f"{WORDS} {' '.join(made_tokenizers.WORDS)}".split(),
        [*f"{ODD} {ADDED} {CLUSTERS} {COMPATIBLE}".split(), *MARKS],
    )

    def part() -> str:
        kind = chosen.random()
        if kind < 0.4:
            return chosen.choice(words)
        if kind < 0.7:
            return chosen.choice(odd)
        if kind < 0.75:
            return chosen.choice(made_tokenizers.SCRIPTS)[0] * chosen.randint(2, 12)
        if kind < 0.85:
            return "".join(chosen.choices(chosen.choice(made_tokenizers.SCRIPTS), k=chosen.randint(1, 12)))
        first, last = chosen.choice(RANGES)
        return "".join(chr(chosen.randint(first, last)) for _ in range(chosen.randint(1, 8))).encode("utf-8", "ignore").decode()

    return [chosen.choice(["", " ", "  "]).join(part() for _ in range(chosen.randint(0, 6))) for _ in range(count)]


@pytest.fixture(scope="session")
def probe() -> Path:
    return build_host() / "hst-trt-probe"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, File]:
    """Tokenizers as bundles of Stable Diffusion 3.5 have them, and their other shapes."""
    folder = tmp_path_factory.mktemp("tokenizers")
    found = {
        "clip": made_tokenizers.make_clip(folder / "tokenizer", pad_token="<|endoftext|>"),
        "clip 2": made_tokenizers.make_clip(folder / "tokenizer_2", pad_token="!"),
    }
    found |= {
        f"t5 {rules}": made_tokenizers.make_t5(folder / rules, rules=rules) for rules in ("nmt_nfkc", "nfkc", "nmt_nfkc_cf")
    }
    found |= {f"clip, {name}": file for name, file in made_tokenizers.clip_variants(found["clip"])}
    return found | {f"t5, {name}": file for name, file in made_tokenizers.t5_variants(found["t5 nmt_nfkc"])}


FILES = [
    "clip", "clip 2", "t5 nmt_nfkc", "t5 nfkc", "t5 nmt_nfkc_cf", "clip, the regex of transformers 4", "clip, merges as lines",
    "clip, a template", "clip, concepts", "clip, no unknown token", "t5, transformers 4", "t5, transformers 4, not legacy",
    "t5, older transformers 4", "t5, no mark in front", "t5, unsplit", "t5, no rules",
]  # fmt: skip


def write(path: Path, file: object) -> Path:
    path.write_text(json.dumps(file, ensure_ascii=False), encoding="utf-8")
    return path


def run(probe: Path, path: Path, many: Iterable[str], *, length: int, pad_id: int = 0) -> subprocess.CompletedProcess[bytes]:
    sent = b"".join(struct.pack("<Q", len(data)) + data for data in (text.encode() for text in many))
    return subprocess.run(
        [probe, "tokenize", path, str(length), str(pad_id)], input=sent, capture_output=True, timeout=120, check=False
    )


def host_ids(probe: Path, path: Path, many: Sequence[str], *, length: int, pad_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """How many ids each text needs, and its ids, cut and padded to the length."""
    done = run(probe, path, many, length=length, pad_id=pad_id)
    assert done.returncode == 0, done.stderr
    table = np.frombuffer(done.stdout, np.int64).reshape(len(many), length + 1)
    return table[:, 0], table[:, 1:]


def assert_same(probe: Path, path: Path, many: Sequence[str]) -> None:
    expected = [encoding.ids for encoding in Tokenizer.from_file(str(path)).encode_batch(many)]
    needed, ids = host_ids(probe, path, many, length=max(map(len, expected)), pad_id=-1)
    table = np.full(ids.shape, -1, np.int64)
    for row, whole in zip(table, expected, strict=True):
        row[: len(whole)] = whole
    assert [ascii(many[i]) for i in np.flatnonzero((table != ids).any(axis=1))] == []
    assert needed.tolist() == list(map(len, expected))


# -- ids ---------------------------------------------------------------------------------------------------------------
def test_every_shape_is_tested(files: dict[str, File]) -> None:
    assert sorted(files) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_ids_are_those_of_the_tokenizers_library(probe: Path, files: dict[str, File], tmp_path: Path, name: str) -> None:
    assert_same(probe, write(tmp_path / "tokenizer.json", files[name]), texts(10_000, seed=FILES.index(name)))


@pytest.mark.parametrize("name", FILES[:3])
@pytest.mark.parametrize("length", [2, 3, 16, 77])
def test_texts_are_cut_and_padded_as_in_python(
    probe: Path, files: dict[str, File], tmp_path: Path, name: str, length: int
) -> None:
    path, many = write(tmp_path / "tokenizer.json", files[name]), ["", " ", *texts(1000, seed=length)]
    found = host_ids(probe, path, many, length=length, pad_id=5)[1]
    np.testing.assert_array_equal(found, PromptTokenizer(path.read_bytes(), name, length, 5)(many))


@pytest.mark.parametrize("index", range(3))
def test_a_bundles_tokenizers_are_pythons(probe: Path, demo_bundle: Path, index: int) -> None:
    entry = open_bundle(demo_bundle).manifest.tokenizers[index]
    host, many = (
        HostBundle(Library(probe.parent / "libhst_trt.so"), demo_bundle),
        [t.replace("\0", "") for t in texts(2000, seed=index)],
    )
    expected = PromptTokenizer((demo_bundle / entry.path).read_bytes(), "tokenizer", entry.length, entry.pad_id)(many)
    for text, row in zip(many, expected, strict=True):
        assert host.tokenize(index, text)[0] == row.tolist(), ascii(text)


def test_cuts_that_are_equally_likely_are_the_librarys(probe: Path, files: dict[str, File], tmp_path: Path) -> None:
    """Its reading of one score in eight is a last bit off, which decides between "aaa a" and "a aaa"."""
    chosen = random.Random(0)
    scores = [["<unk>", 0.0], *(["a" * i, float(np.float32(-(i**0.9) - chosen.random() / 1e5))] for i in range(1, 40))]
    file = changed(files["t5, no rules"], lambda f: f["model"].update(vocab=scores, unk_id=0))
    file.update(pre_tokenizer={**METASPACE, "prepend_scheme": "never"}, added_tokens=[])
    read = json.loads(Tokenizer.from_str(json.dumps(file)).to_str())["model"]["vocab"]
    assert 2 < sum(a[1] != b[1] for a, b in zip(read, scores, strict=True)) < 15  # else there is nothing to be tested here
    assert_same(probe, write(tmp_path / "tokenizer.json", file), ["a" * i for i in range(1, 500)])


# -- Unicode -----------------------------------------------------------------------------------------------------------
def visible(file: File, normalizer: File | None) -> File:
    """A tokenizer whose ids are the bytes of what the normalizer leaves, and where CLIP's words end."""

    def change(f: File) -> None:
        letters = [token for token in f["model"]["vocab"] if len(token.removesuffix("</w>")) == 1]
        f["model"].update(vocab={letter: index for index, letter in enumerate(letters)}, merges=[], unk_token=None)
        f.update(added_tokens=[], normalizer=normalizer, post_processor=ROBERTA)

    return changed(file, change)


def compiled(rules: dict[str, str]) -> File:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap(rules)).decode()}


def around(c: str) -> str:
    """A character where words, clusters and normal forms meet it."""
    return f"a{c}b {c}{c}1{c}\u0301\u0334 '{c}" + unicodedata.normalize("NFD", c)


def in_clusters(c: str) -> str:
    """A character where each rule of UAX #29 meets it. A mark at the end is lost where what is before it starts a cluster."""
    mark, joiner, picture, consonant, linker = "\u0301", "\u200d", "\u00a9", "\u0915", "\u094d"
    parts = [
        f"a{c}", f"{c}{mark}{mark}", f"{c}a{mark}", f"{c}\u1161{mark}", f"{c}\u11a8{mark}", f"{c}\uac00{mark}",
        f"{c}{joiner}{picture}{mark}",
        f"{c}{linker}{consonant}{mark}", f"{consonant}{c}{consonant}{mark}", f"{consonant}{c}{linker}{consonant}{mark}",
        f"\u00ae{c}{joiner}{picture}{mark}",
    ]  # fmt: skip
    return "\n".join(parts)


CLUSTER_RULES = {"a": "A", "\u0301": "B", "\u1161": "C", "\u11a8": "D", "\uac00": "E", "\u00a9": "F", "\u0915": "G"}


def assert_same_for(points: Sequence[int], probe: Path, files: dict[str, File], folder: Path) -> None:
    """The CLIP normal form and its words; T5's rules; clusters, with rules that show them."""
    clip, rules = files["clip"], files["t5 nmt_nfkc"]["normalizer"]
    for normalizer, written in ((clip["normalizer"], around), (rules, around), (compiled(CLUSTER_RULES), in_clusters)):
        path = write(folder / "tokenizer.json", visible(clip, normalizer))
        for start in range(0, len(points), 16384):
            chunks = (points[i : i + 64] for i in range(start, min(start + 16384, len(points)), 64))
            assert_same(probe, path, ["".join(written(chr(point)) for point in chunk) for chunk in chunks])


def test_characters_are_the_librarys(probe: Path, files: dict[str, File], tmp_path: Path) -> None:
    dense = [range(0x1300), range(0x1F80, 0x2080), range(0xA940, 0xA980), range(0x1F1C0, 0x1F200), range(0xE0000, 0xE0100)]
    assert_same_for(sorted({*POINTS[::211], *(p for part in dense for p in part)}), probe, files, tmp_path)


@pytest.mark.slow
def test_all_characters_are_the_librarys(probe: Path, files: dict[str, File], tmp_path: Path) -> None:
    assert_same_for(POINTS, probe, files, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["single_word", "lstrip", "rstrip"])
def test_all_characters_beside_an_added_token_are_the_librarys(
    probe: Path, files: dict[str, File], tmp_path: Path, flag: str
) -> None:
    file = visible(files["clip"], None)
    file["added_tokens"] = [{"id": 9999, **made_tokenizers.added("<t>"), flag: True}]
    path = write(tmp_path / "tokenizer.json", file)
    for start in range(0, len(POINTS), 65536):
        assert_same(
            probe,
            path,
            [
                "".join(f"{chr(p)}<t>{chr(p)}." for p in POINTS[i : i + 64])
                for i in range(start, min(start + 65536, len(POINTS)), 64)
            ],
        )


def test_the_tables_are_of_the_library_in_use() -> None:
    assert f"from tokenizers {tokenizers.__version__};" in TARGET.read_text(encoding="ascii").splitlines()[0]


# -- time --------------------------------------------------------------------------------------------------------------
MEGABYTE = {
    "one word": "a" * 10**6, "letters": "abcdefghij" * 10**5, "digits": "1" * 10**6, "apostrophes": "'" * 10**6,
    "spaces": " " * 10**6,
    "words": "a photo of " * 90_000, "marks": "e" + "\u0301" * 500_000, "marks of two classes": "e" + "\u0301\u0323" * 250_000,
    "flags": "🇩🇪" * 125_000, "joined": "👩\u200d" * 140_000, "added": "<|endoftext|>" * 77_000,
    "almost added": "<|endoftext|" * 80_000,
    "sentinels": " <extra_id_1> " * 70_000, "T5's marks": "\u2581" * 330_000, "Hangul": "각" * 330_000,
    "a fast grower": "\ufdfa" * 330_000,
}  # fmt: skip


def seconds(work: Callable[[], object]) -> float:
    """Of the processor, in the programs that the work starts: other load on the machine does not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("name", ["clip", "clip, concepts", "t5 nmt_nfkc", "t5, unsplit"])
def test_a_megabyte_takes_seconds_at_most(probe: Path, files: dict[str, File], tmp_path: Path, name: str) -> None:
    """Measured: half a second. What is quadratic takes minutes."""
    path = write(tmp_path / "tokenizer.json", files[name])
    for kind, text in MEGABYTE.items():
        assert seconds(lambda text=text: host_ids(probe, path, [text], length=77)) < 4, kind  # type: ignore[misc]


@pytest.mark.parametrize("name", ["clip", "clip 2", "t5 nmt_nfkc", "t5, transformers 4"])
def test_long_texts_have_the_librarys_ids(probe: Path, files: dict[str, File], tmp_path: Path, name: str) -> None:
    many = ["".join(texts(4000, seed=1))[:100_000], *(text[:50_000] for text in MEGABYTE.values())]
    assert_same(probe, write(tmp_path / "tokenizer.json", files[name]), many)


def test_vocabularies_of_full_size_open_in_a_moment(probe: Path, files: dict[str, File], tmp_path: Path) -> None:
    """Two of CLIP with 49 408 tokens and one of T5 with 32 100. Measured: 0.3 s with the three processes."""
    chosen, clip, t5 = random.Random(0), files["clip"]["model"], files["t5 nmt_nfkc"]["model"]
    vocab, merges = list(clip["vocab"])[:-2], list(clip["merges"])
    known, heads = set(vocab), [token for token in vocab if not token.endswith("</w>")]
    while len(vocab) < 49_406:
        left, right = chosen.choice(heads), chosen.choice(vocab)
        if left + right not in known and len(left + right) < 24:
            known.add(left + right)
            vocab.append(left + right)
            merges.append([left, right])
            if not right.endswith("</w>"):
                heads.append(left + right)
    ids = {token: index for index, token in enumerate([*vocab, "<|startoftext|>", "<|endoftext|>"])}
    pieces = sorted({"".join(chosen.choices("▁abcdefghijklmnopqrstuvwxyzäöü", k=chosen.randint(2, 9))) for _ in range(40_000)})[
        : 32_000 - 400
    ]
    scored = [
        *t5["vocab"][:-100],
        *([piece, float(np.float32(-15 * chosen.random()))] for piece in pieces),
        *t5["vocab"][-100:],
    ]
    large = {
        "clip": changed(files["clip"], lambda f: f["model"].update(vocab=ids, merges=merges)),
        "t5": changed(files["t5 nmt_nfkc"], lambda f: f["model"].update(vocab=scored)),
    }
    paths = [write(tmp_path / f"{name}.json", file) for name, file in large.items()]
    assert seconds(lambda: [host_ids(probe, path, [], length=77) for path in (paths[0], *paths)]) < 2
    for path in paths:
        assert_same(probe, path, texts(1000, seed=3))


# -- what is refused ---------------------------------------------------------------------------------------------------
def set_normalizer(**fields: Any) -> Callable[[File], None]:
    return lambda f: f.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, fields]})


def set_splitter(*parts: File) -> Callable[[File], None]:
    return lambda f: f.update(pre_tokenizer={"type": "Sequence", "pretokenizers": list(parts)})


def set_model(**fields: Any) -> Callable[[File], None]:
    return lambda f: f["model"].update(fields)


def edit_splitter(index: int, **fields: Any) -> Callable[[File], None]:
    return lambda f: f["pre_tokenizer"]["pretokenizers"][index].update(fields)


TWINS = [{"id": 7, **made_tokenizers.added(content, normalized=True)} for content in ("Qq", "qQ")]
UNSUPPORTED: list[tuple[str, Callable[[File], Any], str]] = [
    ("clip", set_model(type="WordPiece"), "WordPiece"),
    ("clip", set_normalizer(type="NFKD"), "NFKD"),
    ("clip", set_normalizer(type="NFKC"), "NFKC"),
    ("clip", set_normalizer(type="BertNormalizer"), "BertNormalizer"),
    ("clip", set_normalizer(type="Replace", pattern={"Regex": "a+"}, content="b"), "a\\+"),
    ("clip", set_normalizer(type="Replace", pattern={"String": "xyz"}, content="b"), "xyz"),
    ("t5 nfkc", set_normalizer(type="Strip", strip_left=True, strip_right=True), "strip_left"),
    ("clip", set_splitter({"type": "Whitespace"}), "pre-tokenizer for BPE"),
    ("clip", set_splitter(METASPACE), "pre-tokenizer for BPE"),
    ("clip", edit_splitter(0, pattern={"Regex": "\\w+"}), "\\\\w\\+"),
    ("clip", edit_splitter(0, behavior="Isolated"), "Isolated"),
    ("clip", edit_splitter(1, add_prefix_space=True), "add_prefix_space"),
    ("clip", edit_splitter(1, use_regex=False), "use_regex"),
    ("clip", set_model(dropout=0.1), "dropout"),
    ("clip", set_model(byte_fallback=True), "byte_fallback"),
    ("clip", set_model(ignore_merges=True), "ignore_merges"),
    ("clip", set_model(fuse_unk=True), "fuse_unk"),
    ("clip", set_model(continuing_subword_prefix="##"), "continuing_subword_prefix"),
    ("clip", lambda f: f.update(post_processor=None), "post-processor"),
    ("clip", lambda f: f["post_processor"].update(type="BertProcessing"), "BertProcessing"),
    ("t5 nfkc", set_model(byte_fallback=True), "byte_fallback"),
    ("t5 nfkc", set_model(unk_id=None), "no unknown token"),
    ("t5 nfkc", edit_splitter(1, replacement="_"), "_"),
    ("t5 nfkc", edit_splitter(1, prepend_scheme="first"), "WhitespaceSplit"),
    ("t5 nfkc", set_splitter({"type": "Digits"}, METASPACE), "pre-tokenizer for Unigram"),
    ("t5 nfkc", lambda f: f["post_processor"]["single"].pop(0), "no prompt"),
    ("t5 nfkc", lambda f: f["post_processor"]["single"].append({"Sequence": {"id": "A", "type_id": 0}}), "another text"),
    ("clip", lambda f: f["added_tokens"].extend(TWINS), "qq"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change", "message"), UNSUPPORTED, ids=[f"{name} {message}" for name, _, message in UNSUPPORTED]
)
def test_a_part_that_is_not_here_is_named_at_once(
    probe: Path, files: dict[str, File], tmp_path: Path, name: str, change: Callable[[File], Any], message: str
) -> None:
    done = run(probe, write(tmp_path / "tokenizer.json", changed(files[name], change)), [], length=77)
    assert done.returncode == 3
    assert re.search(message, done.stderr.decode())


def rules_of(data: bytes) -> Callable[[File], None]:
    return lambda f: f.update(normalizer={"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()})


def trie(units: Sequence[int], replacements: bytes = b"x\0") -> Callable[[File], None]:
    return rules_of(struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + replacements)


def unit(label: int, offset: int, *, ends: bool = False) -> int:
    return label | ends << 8 | offset << 10


def add(**fields: Any) -> Callable[[File], None]:
    return lambda f: f["added_tokens"].append({"id": 9000, **made_tokenizers.added("<new>"), **fields})


ROOT = unit(0, 256)
BLOCK = [0] * 256
DAMAGED: dict[str, tuple[str, Callable[[File], Any]]] = {
    "another version": ("clip", lambda f: f.update(version="2.0")),
    "no model": ("clip", lambda f: f["model"].pop("vocab")),
    "an id below zero": ("clip", lambda f: f["model"]["vocab"].update(a=-1)),
    "an id of 33 bits": ("clip", lambda f: f["model"]["vocab"].update(a=2**32)),
    "an id that is no number": ("clip", lambda f: f["model"]["vocab"].update(a="1")),
    "an id that is not whole": ("clip", lambda f: f["model"]["vocab"].update(a=1.5)),
    "a merge of an unknown token": ("clip", lambda f: f["model"]["merges"].append(["nowhere", "a"])),
    "a merge into an unknown token": ("clip", lambda f: f["model"]["merges"].append(["a", "a</w>a</w>"])),
    "a merge of three": ("clip", lambda f: f["model"]["merges"].append(["a", "a", "a"])),
    "a merge of three in a line": ("clip", lambda f: f["model"].update(merges=["a a a"])),
    "a merge of one": ("clip", lambda f: f["model"].update(merges=["aa"])),
    "merges that are numbers": ("clip", lambda f: f["model"].update(merges=[1, 2])),
    "an unknown token that is unknown": ("clip", set_model(unk_token="nowhere")),
    "no flags of an added token": ("clip", lambda f: f["added_tokens"][0].pop("lstrip")),
    "an added token's id below zero": ("clip", add(id=-1)),
    "an added token without content": ("clip", add(content=None)),
    "added tokens by name": ("clip", lambda f: f.update(added_tokens={"a": 1})),
    "a post-processor without ids": ("clip", lambda f: f["post_processor"].update(cls=["a"])),
    "a post-processor's id below zero": ("clip", lambda f: f["post_processor"].update(sep=["a", -1])),
    "a template with an unknown token": ("t5 nfkc", lambda f: f["post_processor"].update(special_tokens={})),
    "a thousand special tokens": ("t5 nfkc", lambda f: f["post_processor"]["special_tokens"]["</s>"].update(ids=[1] * 1000)),
    "no tokens": ("t5 nfkc", set_model(vocab=[])),
    "a token without a score": ("t5 nfkc", set_model(vocab=[["a"]])),
    "a score that is no number": ("t5 nfkc", set_model(vocab=[["a", "b"]])),
    "an unknown token outside": ("t5 nfkc", set_model(unk_id=10**6)),
    "an unknown token below zero": ("t5 nfkc", set_model(unk_id=-1)),
    "a scheme and its older name at odds": ("t5 nfkc", edit_splitter(1, add_prefix_space=False)),
    "a scheme that is none": ("t5 nfkc", edit_splitter(1, prepend_scheme="sometimes")),
    "a sequence of nothing": ("t5 nfkc", lambda f: f.update(normalizer={"type": "Sequence", "normalizers": [None]})),
    "a strip without sides": ("t5 nfkc", set_normalizer(type="Strip")),
    "rules that are not base64": ("t5 nfkc", lambda f: f["normalizer"].update(precompiled_charsmap="AA*A")),
    "rules with a bit too many": ("t5 nfkc", lambda f: f["normalizer"].update(precompiled_charsmap="AAAAAB==")),
    "rules without padding": ("t5 nfkc", lambda f: f["normalizer"].update(precompiled_charsmap="AAAAAA")),
    "no rules": ("t5 nfkc", lambda f: f["normalizer"].update(precompiled_charsmap="")),
    "rules without a length": ("t5 nfkc", rules_of(b"\x01\0\0")),
    "a trie of four gigabytes": ("t5 nfkc", rules_of(b"\xff\xff\xff\xff" + bytes(64))),
    "a trie that is cut off": ("t5 nfkc", rules_of(struct.pack("<I", 2048) + bytes(2044))),
    "no trie": ("t5 nfkc", rules_of(bytes(8))),
    "a trie of one unit that leads away": ("t5 nfkc", trie([unit(0, 2**20)])),
    "a trie that leads to its very end": ("t5 nfkc", trie([ROOT, *BLOCK])),
    "a root outside": ("t5 nfkc", trie([unit(0, 512), *BLOCK, *BLOCK][:512])),
    "a child outside": ("t5 nfkc", trie([ROOT, *BLOCK[1:], *BLOCK[:97], unit(97, 2**20), *BLOCK[98:]])),
    "a value outside": ("t5 nfkc", trie([ROOT, *BLOCK[1:], *BLOCK[:97], unit(97, 2**20, ends=True), *BLOCK[98:]])),
    "a replacement outside": (
        "t5 nfkc", trie([ROOT, *BLOCK[1:], 2**31 | 77, *BLOCK[1:97], unit(97, 97, ends=True), *BLOCK[98:]]),
    ),
    "a replacement within a character": (
        "t5 nfkc", trie([ROOT, *BLOCK[1:], 2**31 | 1, *BLOCK[1:97], unit(97, 97, ends=True), *BLOCK[98:]], "é\0".encode()),
    ),
    "replacements that are no text": ("t5 nfkc", trie([ROOT, *BLOCK[1:], *BLOCK], b"\xff\0")),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused(probe: Path, files: dict[str, File], tmp_path: Path, name: str) -> None:
    kind, change = DAMAGED[name]
    done = run(probe, write(tmp_path / "tokenizer.json", changed(files[kind], change)), ["a"], length=77)
    assert done.returncode == 6, done.stderr


def test_a_trie_that_runs_in_circles_ends(probe: Path, files: dict[str, File], tmp_path: Path) -> None:
    """`a` leads back to where it was, and has a rule: the library takes its first end, too."""
    circle = trie([ROOT, *BLOCK[1:], 2**31, *BLOCK[1:97], unit(97, 97, ends=True), unit(98, 98), *BLOCK[99:]])
    path = write(tmp_path / "tokenizer.json", changed(visible(files["clip"], None), circle))
    assert_same(probe, path, ["", "a", "b", "aab", "bbba" * 100, "caé\0a", "a\u0301\u0301b"])


@pytest.mark.parametrize("length", [0, -1, 1, 2**20 + 1, 2**62])
def test_a_length_that_cannot_be_is_refused(probe: Path, files: dict[str, File], tmp_path: Path, length: int) -> None:
    assert run(probe, write(tmp_path / "tokenizer.json", files["clip"]), ["a"], length=length).returncode == 6


def test_tokens_of_every_length_and_number_do_no_harm(probe: Path, files: dict[str, File], tmp_path: Path) -> None:
    """A token of a megabyte, a hundred thousand added tokens, merges that form a circle, ids that two tokens share."""

    def grow(f: File) -> None:
        f["model"]["vocab"].update({"a" * 10**6: 5000, "b": 7, "c": 7, "ab": 5001, "ba": 5001, "aba": 5002})
        f["model"]["merges"] += [["a", "b"], ["b", "a"], ["ab", "a"], ["a", "ba"], ["a", "b"]]
        f["added_tokens"] += [{"id": 9000 + i, **made_tokenizers.added(f"<{i}>")} for i in range(100_000)]

    many = ["a" * 5000, "abababab c ba ab aba", "<5><99999><100000>", *texts(300, seed=9)]
    assert_same(probe, write(tmp_path / "tokenizer.json", changed(files["clip"], grow)), many)

    def widen(f: File) -> None:
        f["model"]["vocab"] += [["b" * 1000, -1.0], ["", -1.0], ["a", -1.0], ["a", -2.0], ["\u2581a", -1e300], ["c", 1e300]]

    wide = changed(files["t5 nfkc"], widen)
    many = ["b" * 5000, "a aa c", *texts(300, seed=9)]
    path = write(tmp_path / "tokenizer.json", wide)
    assert_same(probe, path, many)
    ids = host_ids(probe, path, many, length=600)[1]
    wide["model"]["vocab"].append(["b" * 10**6, -1.0])  # which ends the library's process
    np.testing.assert_array_equal(host_ids(probe, write(path, wide), many, length=600)[1], ids)
