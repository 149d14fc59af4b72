"""The JSON of a bundle: RFC 8259 in UTF-8, without what two parsers would read differently.

A bundle has readers in several languages. So keys that stand twice, halves of characters, numbers that no double or no 64-bit
integer holds, NaN and the infinities are refused, and so is nesting that is deeper than any manifest's.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

__all__ = ["MAX_LEVELS", "parse"]

MAX_LEVELS = 200
"""How deep arrays and objects may be nested."""

_INT64 = range(-(2**63), 2**63)


def parse(content: bytes) -> Any:
    """The value that `content` writes.

    Raises:
        ValueError: it is not such JSON.
    """
    try:
        value = json.loads(
            content.decode("utf-8"),
            parse_int=_whole,
            parse_float=_number,
            parse_constant=_refuse_constant,
            object_pairs_hook=_object,
        )
        _check(value, MAX_LEVELS)
    except RecursionError:
        raise ValueError("too many levels") from None
    return value


def _whole(text: str) -> int:
    number = int(text)
    if number not in _INT64:
        raise ValueError(f"{text[:40]} is out of range")
    return number


def _number(text: str) -> float:
    number = float(text)
    if math.isinf(number) or (number == 0 and re.search("[1-9]", text.lower().partition("e")[0])):
        raise ValueError(f"{text[:40]} is out of range")
    return number


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in members:
        if key in table:
            raise ValueError(f"the key {key!r} stands twice")
        table[key] = value
    return table


def _check(value: Any, levels: int) -> None:
    if isinstance(value, str):
        value.encode()  # refuses half a character, which an escape may write
    elif isinstance(value, (dict, list)):
        if levels == 0:
            raise ValueError("too many levels")
        if isinstance(value, dict):
            for key in value:
                key.encode()
            value = value.values()
        for item in value:
            _check(item, levels - 1)
