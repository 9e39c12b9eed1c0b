"""What can happen to a checkpoint's files, by accident or on purpose: each a function of the files and a few numbers.

Files are a dict of contents; a mutation changes it in place and returns what it did in words.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.manifest import digest_of


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link in place of a file."""

    target: str


Files = dict[str, bytes | Link]

CANARY = "CANARY"
"""Environment variable with the path that payloads touch."""
SEALED = ", under a checksum that fits"
"""Said of metadata that an attacker has signed again."""
NAMES = (
    "../outside",
    "/etc/passwd",
    "a/../../outside/secret.safetensors",
    "",
    ".",
    "..",
    "nul\0l",
    "new\nline",
    "\x1b[31mred",
    "x" * 5000,
    "\ud800",
    "a.exp_avg",
    "é" * 200,
)
NUMBERS = (0, 1, -1, 7, 255, 2**16, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63))
OTHERS = (None, True, [], {}, 1.5, float("nan"), float("inf"), [[[]]], {"a": 1}, "F32", "1" * 400)
DEPTH = 5_000


def _pick(items: Any, number: int) -> Any:
    items = list(items)
    return items[number % len(items)]


def _content(files: Files, name: str) -> bytes:
    data = files[name]
    return data if isinstance(data, bytes) else b""


# ---------------------------------------------------------------- accidents


def truncate(files: Files, a: int, b: int, c: int) -> str:
    name = _pick(files, a)
    data = _content(files, name)
    files[name] = data[: b % (len(data) + 1)]
    return f"{name} ends at byte {len(files[name])}"


def grow(files: Files, a: int, b: int, c: int) -> str:
    name = _pick(files, a)
    garbage = (b % 251).to_bytes(1, "little") * (1 + c % 100)
    files[name] = _content(files, name) + garbage
    return f"{name} has {len(garbage)} bytes more"


def flip(files: Files, a: int, b: int, c: int) -> str:
    """One to eight bits, half the time near the beginning or the end, where headers are."""
    name = _pick(files, a)
    data = bytearray(_content(files, name))
    places = []
    for index in range(1 + c % 8 if data else 0):
        number = (b >> index) * 2654435761 + index * c
        room = min(len(data), 600) if (c >> 3) % 4 else len(data)
        at = number % room if (c >> 5) % 2 else len(data) - 1 - number % room
        data[at] ^= 1 << (number >> 7) % 8
        places.append(at)
    files[name] = bytes(data)
    return f"{name} has other bits at {places}"


def zero(files: Files, a: int, b: int, c: int) -> str:
    name = _pick(files, a)
    data = bytearray(_content(files, name))
    start = b % (len(data) + 1)
    end = min(len(data), start + 1 + c % 600)
    data[start:end] = bytes(end - start)
    files[name] = bytes(data)
    return f"{name} is zero from {start} to {end}"


def delete(files: Files, a: int, b: int, c: int) -> str:
    name = _pick(files, a)
    if len(files) > 1:
        del files[name]
    return f"{name} is gone"


def rename(files: Files, a: int, b: int, c: int) -> str:
    """To a neighbour's name, or to one that nobody has."""
    name, other = _pick(files, a), _pick(files, b)
    other = other if c % 2 else _numbered(name, c)
    if other != name:
        files[other] = files.pop(name)
    return f"{name} is called {other}"


def swap(files: Files, a: int, b: int, c: int) -> str:
    name, other = _pick(files, a), _alike(files, _pick(files, a), b)
    files[name], files[other] = files[other], files[name]
    return f"{name} and {other} are exchanged"


def duplicate(files: Files, a: int, b: int, c: int) -> str:
    name = _pick(files, a)
    other = _alike(files, name, b) if c % 2 else _numbered(name, c)
    files[other] = files[name]
    return f"{other} is a copy of {name}"


def _alike(files: Files, name: str, number: int) -> str:
    """Another file with the same suffix, where there is one."""
    suffix = Path(name).suffix
    return str(_pick([one for one in files if one != name and Path(one).suffix == suffix] or [name], number))


def _numbered(name: str, number: int) -> str:
    """The name with one of its digits changed: another rank's, step's or layer's."""
    digits = [at for at, character in enumerate(name) if character.isdigit()]
    if not digits:
        return name + ".1"
    at = _pick(digits, number >> 1)
    return name[:at] + str((int(name[at]) + 1 + number % 3) % 10) + name[at + 1 :]


def link(files: Files, a: int, b: int, c: int) -> str:
    name = _pick(files, a)
    target = _pick(["../../outside/secret.safetensors", "/dev/zero", "/etc/passwd", Path(name).name, "..", "gone"], b)
    files[name] = Link(target)
    return f"{name} is a link to {target}"


# ---------------------------------------------------------------- JSON


def json_file(files: Files, a: int, b: int, c: int) -> str:
    """A value of a JSON file or safetensors header is another one; sometimes with the checksum that fits."""
    names = [name for name in files if name.endswith((".json", ".safetensors", ".distcp"))]
    if not names:
        return flip(files, a, b, c)
    name = _pick(names, a)
    data = _content(files, name)
    try:
        begin, end = _json_place(name, data)
        value = json.loads(data[begin:end])
    except (ValueError, RecursionError):
        return truncate(files, a, b, c)
    done = _change(value, b, c)
    text = json.dumps(value).encode()
    if c % 13 == 0:
        text, done = b"[" * DEPTH, "brackets alone"
    if (a >> 8) % 2 and isinstance(value, dict) and "digest" in value:
        del value["digest"]
        body = json.dumps(value, separators=(",", ":")).encode()
        value["digest"] = digest_of(body)
        text, done = json.dumps(value, separators=(",", ":")).encode(), done + SEALED
    head = b"" if name.endswith(".json") else ((c % 5 and len(text)) or _pick(NUMBERS[3:12], b)).to_bytes(8, "little")
    files[name] = data[: max(0, begin - 8)] + head + text + data[end:]
    return f"{name}: {done}"


def _json_place(name: str, data: bytes) -> tuple[int, int]:
    if name.endswith(".json"):
        return 0, len(data)
    length = int.from_bytes(data[:8], "little")
    if length > len(data):
        raise ValueError("no safetensors")
    return 8, 8 + length


def _change(value: Any, b: int, c: int) -> str:
    """Replace one value inside, or a key."""
    places = _places(value, ())
    if not places:
        return "nothing"
    holder, key, path = _pick(places, b)
    new = _pick([*NAMES, *NUMBERS, *OTHERS], c)
    if isinstance(holder, dict) and c % 7 == 0:
        name = str(new)
        holder[name] = holder.pop(key)
        return f"{path} is called {name[:40]!r}"
    holder[key] = new
    return f"{path} is {str(new)[:40]!r}"


def _places(value: Any, path: tuple[Any, ...]) -> list[tuple[Any, Any, str]]:
    found = []
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in members:
        found.append((value, key, "/".join(map(str, (*path, key)))))
        found += _places(member, (*path, key))
    return found


# ---------------------------------------------------------------- pickles


def pickled(files: Files, a: int, b: int, c: int) -> str:
    """An opcode of a pickle is another one: hostile numbers and names, payloads, depth; its checksum fits."""
    names = [name for name in files if name == ".metadata" or _content(files, name)[:2] == b"PK"]
    if not names:
        return json_file(files, a, b, c)
    name = _pick(names, a)
    data = _content(files, name)
    if name == ".metadata":
        files[name], done = _changed_pickle(data, b, c)
        return f"{name}: {done}"
    try:
        entries = _entries(data)
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return truncate(files, a, b, c)
    inner = next((one for one in entries if one.endswith("data.pkl")), None)
    if inner is None:
        return truncate(files, a, b, c)
    entries[inner], done = _changed_pickle(entries[inner], b, c)
    files[name] = _zipped(entries.items())
    return f"{name}: {done}"


def _entries(data: bytes) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {one.filename: archive.read(one) for one in archive.infolist()}
    except zlib.error as error:
        raise ValueError(str(error)) from error


def _zipped(entries: Any, compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", compression) as archive:
        warnings.simplefilter("ignore")  # two entries of one name are what some cases are about
        for name, data in entries:
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return out.getvalue()


def _changed_pickle(data: bytes, b: int, c: int) -> tuple[bytes, str]:
    try:
        codes = list(pickletools.genops(data))
    except Exception:
        return data[: b % (len(data) + 1)], "it is cut"
    ends = [*(at for _, _, at in codes[1:]), len(data)]
    kinds = ("INT", "BININT", "BININT1", "BININT2", "LONG1")
    simple = [i for i, (code, _, _) in enumerate(codes) if code.name in kinds or "UNICODE" in code.name]
    calls = [i for i, (code, _, _) in enumerate(codes) if code.name == "GLOBAL"]
    if c % 11 == 0 and calls:
        at = _pick(calls, b)
        new, words = (
            _pick([b"cposix\nsystem\n", b"cbuiltins\neval\n", b"c../x\ny\n", b"cbuiltins\nlist\n"], c),
            "a name",
        )
    else:
        at = _pick(simple or range(len(codes) - 1), b)
        new, words = _hostile_value(codes[at][0].name, c)
    return data[: codes[at][2]] + new + data[ends[at] :], f"opcode {at} ({str(codes[at][1])[:40]!r}) is {words}"


def _hostile_value(code: str, c: int) -> tuple[bytes, str]:
    payloads = {"a payload": payload(), "depth": depth(), "laughs": laughs(), "a cycle": b"]q\xfah\xfaa"}
    if c % 5 == 0:
        words = _pick(payloads, c // 5)
        return payloads[words], words
    value = _pick(OTHERS, c) if c % 17 == 1 else _pick(NAMES[:10] if "UNICODE" in code else NUMBERS, c)
    try:
        text = pickle.dumps(value, 2)[2:-1]
    except UnicodeEncodeError:
        text = b"N"
    return text, f"{str(value)[:40]!r}"


def payload() -> bytes:
    """Touches the canary when it is executed."""
    command = f'touch "${CANARY}"'.encode()
    return b"cposix\nsystem\n" + b"X" + len(command).to_bytes(4, "little") + command + b"\x85R"


@cache
def depth() -> bytes:
    """A list in a list in a list ..."""
    return b"]" * DEPTH + b"a" * (DEPTH - 1)


@cache
def laughs() -> bytes:
    """Forty lists, each of two of the one before: 2**40 items for who walks them."""
    doubled = b"".join(b"](h%ch%ceq%c0" % (at, at, at + 1) for at in range(200, 240))
    return b"]q\xc80" + doubled + b"h\xf0"


def zipped(files: Files, a: int, b: int, c: int) -> str:
    """Archives that lie: compressed, swollen, doubled, or with another directory than contents."""
    names = [name for name in files if _content(files, name)[:2] == b"PK"]
    if not names:
        return json_file(files, a, b, c)
    name = _pick(names, a)
    data = _content(files, name)
    try:
        entries = _entries(data)
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return truncate(files, a, b, c)
    way = _pick(("compressed", "bomb", "doubled", "directory", "names"), b)
    if way == "compressed":
        files[name] = _zipped(entries.items(), zipfile.ZIP_DEFLATED)
    elif way == "bomb":
        files[name] = bomb(_pick(entries, c))
    elif way == "doubled":
        twice = _pick(entries, c)
        files[name] = _doubled(entries, twice)
    elif way == "names":
        old = _pick(entries, c)
        files[name] = _zipped((_pick(NAMES[:4], b >> 3) if one == old else one, held) for one, held in entries.items())
    else:
        files[name] = _lying(data, b >> 3, c)
    return f"{name} is an archive: {way}"


@cache
def bomb(inner: str) -> bytes:
    """200 MiB of zeros in 200 KB."""
    squeezed = zlib.compressobj(9, zlib.DEFLATED, -15)
    block, size = bytes(1 << 20), 200 << 20
    body = b"".join(squeezed.compress(block) for _ in range(200)) + squeezed.flush()
    whole = bytearray(_zipped([(inner, body)]))
    directory = whole.rindex(b"PK\x01\x02")
    for start in (0, directory):
        at = start + (8 if start == 0 else 10)
        whole[at : at + 2] = (8).to_bytes(2, "little")
        at = start + (22 if start == 0 else 24)
        whole[at : at + 4] = size.to_bytes(4, "little")
    return bytes(whole)


def _doubled(entries: dict[str, bytes], twice: str) -> bytes:
    """Two records of one name, which `zipfile` itself warns of."""
    marked = twice[:-1] + "\x01"
    data = _zipped([*entries.items(), (marked, bytes(len(entries[twice])))])
    return data.replace(marked.encode(), twice.encode())


def _lying(data: bytes, b: int, c: int) -> bytes:
    """A field of the central directory has another value."""
    starts = [at for at in range(len(data)) if data.startswith(b"PK\x01\x02", at)]
    if not starts:
        return data
    at = _pick(starts, b) + _pick((10, 16, 20, 24, 28, 30, 42), b >> 4)
    value = _pick((0, 1, 2, 8, 255, len(data) - 1, len(data), 2**31, 2**32 - 1), c)
    size = 2 if data[at - 2 : at] == b"PK" or (b >> 4) % 7 in (0, 4, 5) else 4
    return data[:at] + (value % 256**size).to_bytes(size, "little") + data[at + size :]


ACCIDENTS: dict[str, Callable[[Files, int, int, int], str]] = {
    "flip": flip,
    "truncate": truncate,
    "zero": zero,
    "grow": grow,
    "delete": delete,
    "rename": rename,
    "swap": swap,
    "duplicate": duplicate,
}
ATTACKS: dict[str, Callable[[Files, int, int, int], str]] = {
    "json": json_file,
    "pickle": pickled,
    "zip": zipped,
    "link": link,
}
"""What somebody does on purpose, with the checksums that go with it: values may then be whatever he says."""
