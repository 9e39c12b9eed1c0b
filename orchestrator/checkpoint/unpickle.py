"""Reading pickles without executing them: a stack machine that only ever makes plain values and inert records.

Other tools keep their metadata in pickles. Here a class or function that a pickle names stays a name (`Name`), and what
it would have built stays a record of how (`Record`), except for a dozen constructors of plain data. Nothing is
imported, nothing is called; what is made is bounded by the number of opcodes, which is bounded by the bytes.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

MAX_MEMO = 1 << 24
"""Values a pickle may refer back to."""
MAX_DEPTH = 200
"""Containers within one another: who walks the value may do so by recursion."""


class PickleError(ValueError):
    """The bytes are not a pickle that this machine reads."""


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function by its module and name; never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Record:
    """What a constructor would have been given: its name, its arguments, and the state set afterwards."""

    name: Name
    args: tuple[Any, ...]
    state: Any = None
    items: list[Any] = field(default_factory=list)
    pairs: dict[Any, Any] = field(default_factory=dict)

    def get(self, key: str, default: Any = None) -> Any:
        """An attribute, as the object's `__dict__` or slots would have held it."""
        for part in self.state if isinstance(self.state, tuple) else (self.state,):
            if isinstance(part, dict) and key in part:
                return part[key]
        return default


Builder = Callable[..., Any]

_MARK = object()
_SIZED = (tuple, list, dict, set, frozenset, str, bytes)


def unpickle(
    data: bytes | memoryview, persistent: Builder | None = None, builders: dict[str, Builder] | None = None
) -> Any:
    """The value that the pickle describes.

    `persistent(id)` resolves persistent ids (torch's storages); `builders` maps `module.name` to a function that makes
    plain data of the arguments, beside those for Python's own containers. Raises `PickleError` for anything malformed.
    """
    machine = _Machine(bytes(data), persistent, _PLAIN | (builders or {}))
    try:
        value = machine.run()
        _require_tree(value, 4 * len(data) + 1024)
        return value
    except PickleError:
        raise
    except (IndexError, KeyError, TypeError, ValueError, struct.error, RecursionError, OverflowError) as error:
        raise PickleError(f"byte {machine.at}: {type(error).__name__} ({str(error)[:100]})") from error


def _require_tree(value: Any, most_items: int) -> None:
    """Refuse what is endless or huge to walk: containers in themselves, or shared so often that few bytes stand for
    ever more items.
    """
    level, items, depth = [value], 0, 0
    while level:
        depth += 1
        inner: list[Any] = []
        for one in level:
            for members in _members(one):
                items += len(members)
                inner += [member for member in members if type(member) in _CONTAINERS]
            if items > most_items or depth > MAX_DEPTH:
                raise PickleError(f"its values are nested more than {MAX_DEPTH} deep, or shared too often")
        level = inner


_CONTAINERS = frozenset({list, tuple, dict, set, frozenset, Record})
"""Types, not classes: what the machine makes has no subclasses."""


def _members(value: Any) -> tuple[Collection[Any], ...]:
    kind = type(value)
    if kind is tuple or kind is list:
        return (value,)
    if kind is dict:
        return value.keys(), value.values()
    if kind is Record:
        members = value.args, (value.state,), value.items
        return (*members, value.pairs.keys(), value.pairs.values()) if value.pairs else members
    return (value,) if kind is set or kind is frozenset else ()


def _encoded(text: Any, encoding: Any = "utf-8") -> bytes:
    """`_codecs.encode`, which protocol 2 writes for bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise PickleError(f"bytes are encoded as {encoding!r}")
    return text.encode(encoding)


def _pairs(*args: Any) -> dict[Any, Any]:
    return dict(*(args[:1]))


def _default_dict(*args: Any) -> dict[Any, Any]:
    return dict(*args[1:2])


_PLAIN: dict[str, Builder] = {
    "collections.OrderedDict": _pairs,
    "collections.defaultdict": _default_dict,
    "collections.deque": lambda *args: list(*args[:1]),
    "collections.Counter": _pairs,
    "builtins.dict": _pairs,
    "builtins.list": list,
    "builtins.tuple": tuple,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.complex": complex,
    "builtins.slice": slice,
    "builtins.bytearray": lambda *args: bytes(*args) if args and not isinstance(args[0], int) else b"",
    "builtins.bytes": lambda *args: bytes(*args) if args and not isinstance(args[0], int) else b"",
    "_codecs.encode": _encoded,
    "torch.Size": tuple,
}
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg", "UserDict": "collections"}


class _Machine:
    """One run over one pickle."""

    def __init__(self, data: bytes, persistent: Builder | None, builders: dict[str, Builder]) -> None:
        self.data = data
        self.at = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0
        self.persistent = persistent
        self.builders = builders
        self.names: list[Name] = []
        self.builder_of: dict[int, Builder | None] = {}

    def run(self) -> Any:
        """Metadata have hundreds of thousands of opcodes: the frequent ones are done in place, others by `_CODES`."""
        data, stack, memo = self.data, self.stack, self.memo
        push, at, end = stack.append, self.at, len(self.data)
        while at < end:
            code = data[at]
            at += 1
            if code == 0x94 and len(memo) < MAX_MEMO:  # MEMOIZE
                memo[len(memo)] = stack[-1]
            elif code == 0x68:  # BINGET
                push(memo[data[at]])
                at += 1
            elif code == 0x6A and at + 4 <= end:  # LONG_BINGET
                push(memo[int.from_bytes(data[at : at + 4], "little")])
                at += 4
            elif code == 0x4B:  # BININT1
                push(data[at])
                at += 1
            elif code == 0x28:  # MARK
                push(_MARK)
            elif code == 0x85 and stack[-1] is not _MARK:  # TUPLE1
                stack[-1] = (stack[-1],)
            elif code == 0x29:  # EMPTY_TUPLE
                push(())
            elif code == 0x7D:  # EMPTY_DICT
                push({})
            elif code in (0x81, 0x52):  # NEWOBJ, REDUCE
                self.at = at
                args = stack.pop()
                stack[-1] = self.build(stack[-1], args)
            elif code == 0x62 and type(stack[-2]) is Record:  # BUILD
                state = stack.pop()
                stack[-1].state = state
            elif code == 0x86 and stack[-1] is not _MARK and stack[-2] is not _MARK:  # TUPLE2
                last = stack.pop()
                stack[-1] = (stack[-1], last)
            elif code == 0x2E:  # STOP
                self.at = at
                return stack.pop()
            else:
                self.at = at
                action = _CODES.get(code)
                if action is None:
                    raise PickleError(f"byte {at - 1}: opcode {code:#04x} is not read")
                action(self)
                at = self.at
        self.at = at
        raise PickleError("it ends before its end mark")

    # ------------------------------------------------------------ reading

    def take(self, count: int) -> bytes:
        end = self.at + count
        if count < 0 or end > len(self.data):
            raise PickleError(f"byte {self.at}: {count} bytes are announced but {len(self.data) - self.at} are left")
        piece = self.data[self.at : end]
        self.at = end
        return piece

    def number(self, form: str, size: int) -> int:
        value: int = struct.unpack(form, self.take(size))[0]
        return value

    def line(self) -> str:
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise PickleError(f"byte {self.at}: a line does not end")
        text = self.data[self.at : end].decode("latin-1")
        self.at = end + 1
        return text

    def sized(self, form: str, size: int) -> bytes:
        return self.take(self.number(form, size))

    def marked(self) -> list[Any]:
        """What was pushed since the last mark."""
        stack = self.stack
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is _MARK:
                found = stack[index + 1 :]
                del stack[index:]
                return found
        raise PickleError(f"byte {self.at}: there is no mark")

    # ------------------------------------------------------------ building

    def remember(self, index: int) -> None:
        if not 0 <= index < MAX_MEMO:
            raise PickleError(f"byte {self.at}: memo entry {index} is out of range")
        self.memo[index] = self.stack[-1]

    def build(self, name: Any, args: Any) -> Any:
        if not isinstance(name, Name) or not isinstance(args, tuple):
            raise PickleError(f"byte {self.at}: a {type(name).__name__} is called")
        if not args:
            builder = self.builder_of[id(name)]
            return Record(name, ()) if builder is None else builder()
        if _MARK in args:
            raise PickleError(f"byte {self.at}: a mark is an argument")
        for argument in args:
            if isinstance(argument, _SIZED):
                self.copied += len(argument)
        if self.copied > 4 * len(self.data) + 1024:
            raise PickleError(f"byte {self.at}: it copies more items than it has bytes")
        builder = self.builder_of[id(name)]
        return Record(name, args) if builder is None else builder(*args)

    def reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.build(self.stack[-1], args)

    def new_object(self, keywords: bool) -> None:
        if keywords:
            extra = self.stack.pop()
            if extra != {}:
                raise PickleError(f"byte {self.at}: an object is made with keywords")
        self.reduce()

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleError(f"byte {self.at}: a class is named by a {type(module).__name__}")
        named = Name(_PYTHON_2.get(module, module), name)
        self.names.append(named)  # so that no other object gets its identity
        self.builder_of[id(named)] = self.builders.get(str(named))
        self.stack.append(named)

    def set_state(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Record):
            target.state = state  # of plain containers the attributes do not matter

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            target.items.extend(values)
        elif isinstance(target, list):
            target.extend(values)
        else:
            raise PickleError(f"byte {self.at}: something is appended to a {type(target).__name__}")

    def update(self, values: list[Any]) -> None:
        target = self.stack[-1]
        mapping = target.pairs if isinstance(target, Record) else target
        if not isinstance(mapping, dict) or len(values) % 2:
            raise PickleError(f"byte {self.at}: items are set on a {type(target).__name__}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            mapping[key if type(key) in _PLAIN_KEYS else _key(key)] = value

    def add(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, set):
            raise PickleError(f"byte {self.at}: items are added to a {type(target).__name__}")
        target.update(map(_key, values))

    def resolve(self, identity: Any) -> None:
        if self.persistent is None:
            raise PickleError(f"byte {self.at}: a persistent id is not expected here")
        self.stack.append(self.persistent(identity))


_PLAIN_KEYS = frozenset({str, int, Record})


def _key(value: Any) -> Any:
    """Keys of the few types that metadata have: hashing anything else could take for ever."""
    if isinstance(value, tuple):
        if len(value) > 64:
            raise PickleError("a tuple of more than 64 items is a key")
        for member in value:
            if isinstance(member, tuple):
                raise PickleError("nested tuples are a key")
    elif not isinstance(value, str | int | float | bytes | bool | Name | Record | frozenset | type(None)):
        raise PickleError(f"a {type(value).__name__} is a key")
    return value


def _push(value: Any) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value)


def _number(form: str, size: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(machine.number(form, size))


def _bytes(form: str, size: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(machine.sized(form, size))


def _text(form: str, size: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(machine.sized(form, size).decode("utf-8", "surrogatepass"))


def _long(form: str, size: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(int.from_bytes(machine.sized(form, size), "little", signed=True))


def _put(form: str, size: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.remember(machine.number(form, size))


def _get(form: str, size: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(machine.memo[machine.number(form, size)])


def _tuple(count: int) -> Callable[[_Machine], None]:
    def act(machine: _Machine) -> None:
        stack = machine.stack
        if len(stack) < count or _MARK in stack[len(stack) - count :]:
            raise PickleError(f"byte {machine.at}: a tuple of {count} lacks items")
        stack[len(stack) - count :] = [tuple(stack[len(stack) - count :])]

    return act


def _one(method: Callable[[_Machine, list[Any]], None]) -> Callable[[_Machine], None]:
    return lambda machine: method(machine, [machine.stack.pop()])


def _many(method: Callable[[_Machine, list[Any]], None]) -> Callable[[_Machine], None]:
    return lambda machine: method(machine, machine.marked())


def _set_item(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.update([key, value])


def _mapping(machine: _Machine) -> None:
    values = machine.marked()
    machine.stack.append({})
    machine.update(values)


def _memoize(machine: _Machine) -> None:
    machine.remember(len(machine.memo))


def _line_integer(machine: _Machine) -> None:
    text = machine.line()
    if len(text) > 200:
        raise PickleError(f"byte {machine.at}: an integer has {len(text)} digits")
    machine.stack.append(text == "01" if text in ("00", "01") else int(text.rstrip("L")))


def _quoted(text: str) -> str:
    """A string literal of Python 2."""
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
        raise PickleError("a string is not quoted")
    return codecs.escape_decode(text[1:-1].encode("latin-1"))[0].decode("latin-1")


def _stack_name(machine: _Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.name(module, name)


_CODES: dict[int, Callable[[_Machine], None]] = {
    ord("("): _push(_MARK),
    ord("0"): lambda machine: void(machine.stack.pop()),
    ord("1"): lambda machine: void(machine.marked()),
    ord("2"): lambda machine: machine.stack.append(machine.stack[-1]),
    ord("N"): _push(None),
    0x88: _push(True),
    0x89: _push(False),
    0x80: lambda machine: void(machine.take(1)),  # PROTO
    0x95: lambda machine: void(machine.take(8)),  # FRAME
    ord("I"): _line_integer,
    ord("L"): _line_integer,
    ord("J"): _number("<i", 4),
    ord("K"): _number("<B", 1),
    ord("M"): _number("<H", 2),
    0x8A: _long("<B", 1),
    0x8B: _long("<i", 4),
    ord("G"): lambda machine: machine.stack.append(struct.unpack(">d", machine.take(8))[0]),
    ord("F"): lambda machine: machine.stack.append(float(machine.line())),
    ord("V"): lambda machine: machine.stack.append(machine.line().encode("latin-1").decode("raw-unicode-escape")),
    ord("S"): lambda machine: machine.stack.append(_quoted(machine.line())),
    ord("X"): _text("<I", 4),
    0x8C: _text("<B", 1),
    0x8D: _text("<Q", 8),
    ord("B"): _bytes("<I", 4),
    ord("C"): _bytes("<B", 1),
    0x8E: _bytes("<Q", 8),
    0x96: _bytes("<Q", 8),  # BYTEARRAY8
    ord("T"): lambda machine: machine.stack.append(machine.sized("<I", 4).decode("latin-1")),
    ord("U"): lambda machine: machine.stack.append(machine.sized("<B", 1).decode("latin-1")),
    ord("q"): _put("<B", 1),
    ord("r"): _put("<I", 4),
    ord("p"): lambda machine: machine.remember(int(machine.line())),
    0x94: _memoize,
    ord("h"): _get("<B", 1),
    ord("j"): _get("<I", 4),
    ord("g"): lambda machine: machine.stack.append(machine.memo[int(machine.line())]),
    ord(")"): _push(()),
    ord("t"): lambda machine: machine.stack.append(tuple(machine.marked())),
    0x85: _tuple(1),
    0x86: _tuple(2),
    0x87: _tuple(3),
    ord("]"): lambda machine: machine.stack.append([]),
    ord("l"): lambda machine: machine.stack.append(machine.marked()),
    ord("a"): _one(_Machine.append),
    ord("e"): _many(_Machine.append),
    ord("}"): lambda machine: machine.stack.append({}),
    ord("d"): _mapping,
    ord("s"): _set_item,
    ord("u"): _many(_Machine.update),
    0x8F: lambda machine: machine.stack.append(set()),
    0x90: _many(_Machine.add),
    0x91: lambda machine: machine.stack.append(frozenset(map(_key, machine.marked()))),
    ord("c"): lambda machine: machine.name(machine.line(), machine.line()),
    0x93: _stack_name,
    ord("R"): _Machine.reduce,
    0x81: lambda machine: machine.new_object(keywords=False),
    0x92: lambda machine: machine.new_object(keywords=True),
    ord("b"): _Machine.set_state,
    ord("Q"): lambda machine: machine.resolve(machine.stack.pop()),
    ord("P"): lambda machine: machine.resolve(machine.line()),
}


def void(_: Any) -> None:
    """Drop a value."""
