"""Broken files from whole ones: bytes, or what a parser sees in them. Equal seeds give equal files."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

Form = Literal["bytes", "json", "toml", "tensors"]

_DEEP, _DIGITS, _HALF = "@deep@", "@digits@", "@half@"
_RAW = {_DEEP: "[" * 3000 + "]" * 3000, _DIGITS: "9" * 5000, _HALF: '"\\ud800"'}
"""What no encoder writes: nested too deep, too many digits, half a pair of surrogates."""

ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"),
    "", "x", "x" * 5000, "../../x", "/etc", "a\nb", "\u202e\x1b[2J", "\x00", [], {}, [[]], [None], {"": None}, [1, "x"],
    _DEEP, _DIGITS, _HALF,
)  # fmt: skip
LARGE: tuple[Any, ...] = (
    10**308, 10**309, -(10**309), 10**400, 10**4299, 1e308, -1e308, 1.7976931348623157e308, 2**64, 2**64 + 1, -1, 0, 5e-324,
)  # fmt: skip
"""Numbers that a parser gives, and that do not fit a float, a file's number, or arithmetic."""

_TOML = (
    "1" + "0" * 309, "-1" + "0" * 400, "9" * 4300, "1e308", "-1.7976931348623157e308",
    "-1", "0", "1e400", "nan", "inf", "true", '""', '"\\u0000"', '"../../x"', "[]", "{}", "[[[]]]", "1979-05-27", "07:32:00",
    "9" * 5000, "[" * 3000 + "]" * 3000, "a = 1", '"""x', "0x" + "f" * 300, '"' + "x" * 5000 + '"',
)  # fmt: skip
_TYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "U64",
    "F4",
    "C64",
)
_BYTES = (0, 1, 0x7F, 0x80, 0xFF, 0x0A, 0x22, 0x5B, 0x7B)
_WORDS = (
    b"\x00" * 8,
    b"\xff" * 8,
    b"\xff\xff\xff\x7f",
    b"\x00\x00\x00\x80",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"\r\n",
    b'""',
)


def mutated(data: bytes, form: Form, seed: int) -> bytes:
    """A file that differs from a whole one in one to four places.

    Args:
        data: The file.
        form: What its parser reads.
        seed: Which of its mutations.
    """
    chance = random.Random(seed)
    change = _CHANGES[form]
    for _ in range(chance.randint(1, 4)):
        try:
            data = change(data, chance) if chance.random() < 0.75 else _bytes(data, chance)
        except (ValueError, TypeError, AttributeError, RecursionError):  # it is broken too much already
            data = _bytes(data, chance)
    return data


def _bytes(data: bytes, chance: random.Random) -> bytes:
    start = chance.randint(0, len(data))
    end = min(len(data), start + chance.choice((1, 2, 4, 8, 64, 512)))
    kind = chance.randrange(6)
    if kind == 0:
        return data[:start]
    if kind == 1:
        return data[:start] + data[end:]
    if kind == 2:
        return data[:end] + data[start:end] * chance.choice((1, 2, 50)) + data[end:]
    if kind == 3:
        return data[:start] + chance.choice(_WORDS) + data[end:]
    if kind == 4:
        return data[:start] + bytes([chance.choice(_BYTES)]) + data[start + 1 :]
    return data[:start] + bytes([chance.randrange(256)]) + data[start + 1 :]


def _json(data: bytes, chance: random.Random) -> bytes:
    return _text_of(_changed(json.loads(data), chance)).encode(errors="surrogatepass")


def _toml(data: bytes, chance: random.Random) -> bytes:
    lines = data.decode().split("\n")
    places = [number for number, line in enumerate(lines) if re.match(r"\s*[\w.\"-]+\s*=", line)]
    place = chance.choice(places or [0])
    key, _, _ = lines[place].partition("=")
    odd = chance.choice(_TOML)
    lines[place] = chance.choice(
        (f"{key}= {odd}", f"{key}x = {odd}", "", f"{lines[place]}\n{lines[place]}", f"[{key}]")
    )
    return "\n".join(lines).encode()


def _tensors(data: bytes, chance: random.Random) -> bytes:
    """Of a safetensors file, mostly its header, whose length then fits."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    if names and chance.random() < 0.5 and isinstance(one := header[chance.choice(names)], dict):
        change = chance.randrange(4)
        if change == 0:
            one["dtype"] = chance.choice(_TYPES)
        elif change == 1:
            one["shape"] = chance.choice(([], [0], [1], [3, 5], [8, 4], [4, 8, 1], [-1], [2**62, 2**62]))
        elif change == 2:
            header[chance.choice(names) + chance.choice(("", "x"))] = header.pop(chance.choice(names))
        else:
            one["data_offsets"] = [0, chance.choice((0, 4, 2**63))]
    else:
        header = _changed(header, chance)
    text = _text_of(header).encode(errors="surrogatepass")
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def _changed(body: Any, chance: random.Random) -> Any:
    """A value with another one somewhere in it."""
    places: list[tuple[Any, Any]] = []
    waiting = [body]
    while waiting:
        part = waiting.pop()
        inside = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
        for key, item in inside:
            places.append((part, key))
            waiting.append(item)
    if not places or chance.random() < 0.02:
        return chance.choice(ODD)
    part, key = chance.choice(places)
    other = chance.choice(places)
    kind = chance.randrange(7)
    if kind == 5:
        part, key = chance.choice([(p, k) for p, k in places if _is_number(p[k])] or [(part, key)])
        part[key] = chance.choice(LARGE)
    elif kind == 6:
        _everywhere(places, chance)
    elif kind == 0:
        del part[key]
    elif kind == 1 and isinstance(part, dict):
        part[f"{key}x"] = part.pop(key)
    elif kind == 2:
        part[key] = json.loads(json.dumps(other[0][other[1]]))
    else:
        part[key] = chance.choice(ODD)
    return body


def _everywhere(places: list[tuple[Any, Any]], chance: random.Random) -> None:
    """One number in the place of every float, of every whole number, or of all that have one name."""
    kind, large = chance.choice((int, float)), chance.choice(LARGE)
    name = chance.choice(places)[1] if chance.random() < 0.3 else None
    for part, key in places:
        if _is_number(part[key]) and (key == name if name is not None else isinstance(part[key], kind)):
            part[key] = large


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text_of(body: Any) -> str:
    text = json.dumps(body)
    for name, raw in _RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text


_CHANGES: Mapping[Form, Callable[[bytes, random.Random], bytes]] = {
    "bytes": _bytes,
    "json": _json,
    "toml": _toml,
    "tensors": _tensors,
}
