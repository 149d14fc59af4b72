"""Writes the C++ host's Unicode tables, asked of the `tokenizers` library itself, so that both know the same characters.

The library takes its tables from several places (normal forms, case, the regex engine's classes), each of its own version.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import Regex
from tokenizers.normalizers import NFC, NFD, Lowercase
from tokenizers.pre_tokenizers import PreTokenizer, Split, WhitespaceSplit

TARGET = Path(__file__).resolve().parents[1] / "hst_trt" / "csrc" / "src" / "unicode_data.inc"
POINTS = [point for point in range(sys.maxunicode + 1) if not 0xD800 <= point < 0xE000]
HANGUL = range(0xAC00, 0xAC00 + 11172)  # composed by rule, not by table


def main() -> None:
    everything = "".join(map(chr, POINTS))
    letters, numbers, spaces = (
        members(Split(Regex(f"\\{name}+"), "isolated"), everything, name) for name in ("p{L}", "p{N}", "s")
    )
    words = {p for _, (a, b) in WhitespaceSplit().pre_tokenize_str(everything) for p in POINTS[a:b]}
    lower = {p: Lowercase().normalize_str(chr(p)) for p in POINTS}
    apart = {p: NFD().normalize_str(chr(p)) for p in POINTS if p not in HANGUL}
    pairs = dict(composed(apart))
    classes = {p: c for p in POINTS if (c := combining_class(p))}
    assert all(len(text) <= 3 for text in lower.values())
    assert max(map(len, apart.values())) <= 4
    with TARGET.open("w", encoding="ascii") as out:
        print(
            f"// Written by scripts/host_unicode.py from tokenizers {tokenizers.__version__}; not to be changed by hand.",
            file=out,
        )
        ranges(out, "kLetters", letters)
        ranges(out, "kNumbers", numbers)
        ranges(out, "kRegexSpaces", spaces)
        ranges(out, "kSpaces", set(POINTS) - words)
        table(out, "Mapping", "kLower", ((p, *row(text, 3)) for p, text in lower.items() if text != chr(p)))
        table(out, "Decomposition", "kApart", ((p, *row(text, 4)) for p, text in apart.items() if text != chr(p)))
        table(out, "Composition", "kTogether", ((*map(ord, two), p) for two, p in sorted(pairs.items())))
        table(out, "CombiningClass", "kClasses", classes.items())


def members(splitter: PreTokenizer, everything: str, name: str) -> set[int]:
    """The code points that the regex engine counts to a class."""
    probe = Split(Regex(f"\\{name}"), "removed")
    found = set()
    for _, (start, end) in splitter.pre_tokenize_str(everything):
        if not probe.pre_tokenize_str(everything[start]):
            found.update(POINTS[start:end])
    return found


def composed(apart: dict[int, str]) -> Iterator[tuple[str, int]]:
    """Pairs of characters that the normal form C makes one of."""
    for point in apart:
        parts = unicodedata.decomposition(chr(point)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            two = "".join(chr(int(part, 16)) for part in parts)
            if NFC().normalize_str(two) == chr(point):
                yield two, point


def combining_class(point: int) -> int:
    """Its class, 0 where the library does not know it: then it is not moved past a mark of another class."""
    known = unicodedata.combining(chr(point))
    if known <= 1:
        return known
    text = "a" + chr(point) + "\u0334"  # of class 1, which comes first
    return known if NFD().normalize_str(text)[1] == "\u0334" else 0


def row(text: str, length: int) -> list[int]:
    return [*map(ord, text), *[0] * (length - len(text))]


def ranges(out: object, name: str, points: Iterable[int]) -> None:
    found: list[list[int]] = []
    for point in sorted(points):
        if found and point == found[-1][1] + 1:
            found[-1][1] = point
        else:
            found.append([point, point])
    table(out, "Range", name, found)


def table(out: object, kind: str, name: str, rows: Iterable[Iterable[int]]) -> None:
    print(f"constexpr {kind} {name}[] = {{", file=out)
    line = ""
    for one in rows:
        item = "{" + ",".join(f"0x{value:x}" for value in one) + "},"
        if len(line) + len(item) > 126:
            print("  " + line, file=out)
            line = ""
        line += item
    print(f"  {line}\n}};", file=out)


if __name__ == "__main__":
    main()
