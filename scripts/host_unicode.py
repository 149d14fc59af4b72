"""Writes the C++ host's Unicode tables, asked of the `tokenizers` library itself, so that both know the same characters.

The library takes its tables from several places (normal forms, case, the regex engines' classes, clusters), each of its own
version, and none of them need be Python's.
"""

from __future__ import annotations

import struct
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import NFC, NFD, Lowercase, Precompiled
from tokenizers.pre_tokenizers import PreTokenizer, Split, WhitespaceSplit

TARGET = Path(__file__).resolve().parents[1] / "hst_trt" / "csrc" / "src" / "unicode_data.inc"
POINTS = [point for point in range(sys.maxunicode + 1) if not 0xD800 <= point < 0xE000]
HANGUL = range(0xAC00, 0xAC00 + 11172)  # composed by rule, not by table
FLAGS = range(0x1F1E6, 0x1F1E6 + 26)
JOINER = 0x200D


def main() -> None:
    everything = "".join(map(chr, POINTS))
    letters, numbers, spaces = (
        members(Split(Regex(f"\\{name}+"), "isolated"), everything, name) for name in ("p{L}", "p{N}", "s")
    )
    words = {p for _, (a, b) in WhitespaceSplit().pre_tokenize_str(everything) for p in POINTS[a:b]}
    lower = {p: Lowercase().normalize_str(chr(p)) for p in POINTS}
    apart = {p: NFD().normalize_str(chr(p)) for p in POINTS if p not in HANGUL}
    pairs = dict(composed(apart))
    assert all(len(text) <= 3 for text in lower.values())
    assert max(map(len, apart.values())) <= 4
    with TARGET.open("w", encoding="ascii") as out:
        print(
            f"// Written by scripts/host_unicode.py from tokenizers {tokenizers.__version__}; not to be changed by hand.",
            file=out,
        )
        ranges(out, "Range", "kLetters", dict.fromkeys(letters, ""))
        ranges(out, "Range", "kNumbers", dict.fromkeys(numbers, ""))
        ranges(out, "Range", "kRegexSpaces", dict.fromkeys(spaces, ""))
        ranges(out, "Range", "kWordCharacters", dict.fromkeys(word_characters(), ""))
        ranges(out, "Range", "kSpaces", dict.fromkeys(set(POINTS) - words, ""))
        ranges(out, "RoleRange", "kRoles", {p: f",Role::k{role}" for p, role in roles()})
        table(out, "Mapping", "kLower", ((p, *row(text, 3)) for p, text in lower.items() if text != chr(p)))
        table(out, "Decomposition", "kApart", ((p, *row(text, 4)) for p, text in apart.items() if text != chr(p)))
        table(out, "Composition", "kTogether", ((*map(ord, two), p) for two, p in sorted(pairs.items())))
        table(out, "CombiningClass", "kClasses", combining_classes().items())


def members(splitter: PreTokenizer, everything: str, name: str) -> set[int]:
    """The code points that the regex engine counts to a class."""
    probe = Split(Regex(f"\\{name}"), "removed")
    found = set()
    for _, (start, end) in splitter.pre_tokenize_str(everything):
        if not probe.pre_tokenize_str(everything[start]):
            found.update(POINTS[start:end])
    return found


def word_characters() -> set[int]:
    """Those that a token of single words must not stand beside; an engine of its own decides."""
    tokenizer = Tokenizer(WordLevel({"": 0}, unk_token=""))
    tokenizer.add_tokens([AddedToken("#", single_word=True, normalized=False)])
    return {p for p in POINTS if p != ord("#") and tokenizer.encode(chr(p) + "#").ids == [0]}


def composed(apart: dict[int, str]) -> Iterator[tuple[str, int]]:
    """Pairs of characters that the normal form C makes one of."""
    for point, parts in apart.items():
        two = NFC().normalize_str(parts[:-1]) + parts[-1]
        if len(two) == 2 and NFC().normalize_str(two) == chr(point):
            yield two, point


def combining_classes() -> dict[int, int]:
    """Canonical combining classes, from the order that the library brings marks into, beside one mark of each class."""
    overlay, iota = "\u0334", "\u0345"  # of the least class and of the greatest

    def swaps(first: str, second: str) -> bool:
        return NFD().normalize_str("a" + first + second)[1:] == second + first

    marks = [p for p in POINTS if NFD().normalize_str(chr(p)) == chr(p) and (swaps(chr(p), overlay) or swaps(iota, chr(p)))]
    samples: dict[int, str] = {unicodedata.combining(overlay): overlay, unicodedata.combining(iota): iota}
    for point in marks:
        if value := unicodedata.combining(chr(point)):
            samples.setdefault(value, chr(point))
    return {
        point: next(
            v
            for v, sample in samples.items()
            if chr(point) == sample or not (swaps(chr(point), sample) or swaps(sample, chr(point)))
        )
        for point in marks
    }


# -- clusters ----------------------------------------------------------------------------------------------------------


def charsmap(rules: dict[str, str]) -> bytes:
    """sentencepiece's compiled rules, one block of the double array for each node."""
    children: list[dict[int, int]] = [{}]
    values: dict[int, int] = {}
    texts = b""
    for key, text in rules.items():
        node = 0
        for byte in key.encode():
            if byte not in children[node]:
                children[node][byte] = len(children)
                children.append({})
            node = children[node][byte]
        values[node] = len(texts)
        texts += text.encode() + b"\0"
    units = [0] * 256 * (len(children) + 1)

    def unit(node: int, place: int, label: int) -> int:
        offset = place ^ 256 * (node + 1)  # blocks' lowest bytes are free, so the offset's are the place's
        return label | (node in values) << 8 | (offset << 10 if offset < 1 << 21 else offset >> 8 << 10 | 1 << 9)

    units[0] = unit(0, 0, 0)
    for node, below in enumerate(children):
        if node in values:
            units[256 * (node + 1)] = 1 << 31 | values[node]
        for label, child in below.items():
            place = 256 * (node + 1) ^ label
            units[place] = unit(child, place, label)
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + texts


def parted(before: str, after: str) -> Callable[[str], bool]:
    """Whether a text between the two is parted from `after`, whose last character has a rule.

    Where a cluster has five bytes at most and starts with a text that has a rule, the library drops the rest of it: a mark
    behind the last character is lost if, and only if, the cluster starts there.
    """
    last, mark = after[-1], "\u0301"
    normalizer = Precompiled(charsmap({last: "X"}))
    return lambda text: not normalizer.normalize_str(before + text + after + mark).endswith(mark)


def roles() -> Iterator[tuple[int, str]]:
    """What each code point but Hangul syllables, flags and the joiner does in a cluster; see `Role` in unicode.cpp."""
    picture, joiner, consonant, linker = "\u00a9", chr(JOINER), "\u0915", "\u094d"
    mark = Precompiled(charsmap({"a": "X"}))
    before = {
        "Lead": parted("", "\uac00"),
        "Vowel": parted("", "\u1161"),
        "Tail": parted("", "\u11a8"),
        "Prepend": parted("", "b"),
        "Picture": parted("", joiner + picture),
        "Consonant": parted("", linker + consonant),
        "Linker": parted(consonant, consonant),
        "Conjoining": parted(consonant, linker + consonant),
        "Extend": parted("\u00ae", joiner + picture),
    }
    control = Precompiled(charsmap({"\u0301": "X"}))
    for point in POINTS:
        text = chr(point)
        if point in HANGUL or point in FLAGS or point == JOINER:
            continue
        if mark.normalize_str("a" + text) == "X":  # it stays with what is before
            yield point, next((role for role in ("Linker", "Conjoining", "Extend") if not before[role](text)), "SpacingMark")
        elif control.normalize_str(text + "\u0301\u0301") == text + "X":
            yield point, "Control"
        elif role := next(
            (role for role in ("Prepend", "Lead", "Vowel", "Tail", "Picture", "Consonant") if not before[role](text)), ""
        ):
            yield point, role


# -- writing -----------------------------------------------------------------------------------------------------------


def row(text: str, length: int) -> list[int]:
    return [*map(ord, text), *[0] * (length - len(text))]


def ranges(out: object, kind: str, name: str, points: dict[int, str]) -> None:
    """points: code points, and what stands behind a range of them."""
    found: list[list[int]] = []
    for point in sorted(points):
        if found and point == found[-1][1] + 1 and points[point] == points[found[-1][0]]:
            found[-1][1] = point
        else:
            found.append([point, point])
    rows(out, kind, name, (f"0x{first:x},0x{last:x}{points[first]}" for first, last in found))


def table(out: object, kind: str, name: str, values: Iterable[Iterable[int]]) -> None:
    rows(out, kind, name, (",".join(f"0x{value:x}" for value in one) for one in values))


def rows(out: object, kind: str, name: str, items: Iterable[str]) -> None:
    print(f"constexpr {kind} {name}[] = {{", file=out)
    line = ""
    for item in items:
        if len(line) + len(item) > 124:
            print("  " + line, file=out)
            line = ""
        line += "{" + item + "},"
    print(f"  {line}\n}};", file=out)


if __name__ == "__main__":
    main()
