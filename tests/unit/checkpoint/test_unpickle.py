"""The pickle machine makes plain values as pickle does, and never anything else."""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import random
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.checkpoint.unpickle import Name, PickleError, Record, unpickle

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


@given(PLAIN, st.integers(0, 5))
def test_plain_values_are_what_pickle_makes_of_them(value: Any, protocol: int) -> None:
    assert unpickle(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", range(6))
def test_containers(protocol: int) -> None:
    value = {
        "ordered": collections.OrderedDict(a=1, b=[2]),
        "default": collections.defaultdict(list, {"x": [1]}),
        "set": {1, 2, "three"},
        "frozen": frozenset({"a"}),
        "bytes": b"\x00\xff",
        "long": -(2**90),
        "shared": [[1]] * 3,
    }
    assert unpickle(pickle.dumps(value, protocol)) == value


class Evil:
    def __reduce__(self) -> Any:
        return (os.system, ("touch /tmp/regrow-was-here",))


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_is_called(protocol: int) -> None:
    found = unpickle(pickle.dumps({"a": Evil()}, protocol))["a"]
    assert isinstance(found, Record)
    assert found.name in (Name("posix", "system"), Name("os", "system"))
    assert found.args == ("touch /tmp/regrow-was-here",)


class Plain:
    def __init__(self) -> None:
        self.heads = 4


def test_attributes_of_an_unknown_object_can_be_asked_for() -> None:
    found = unpickle(pickle.dumps(Plain()))
    assert isinstance(found, Record)
    assert (found.get("heads"), found.get("tails", 0)) == (4, 0)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02",
        b".",
        b"\x80\x02X\xff\xff\xff\x7fabc.",  # two gigabytes of text are announced
        b"\x80\x02\x8e\xff\xff\xff\xff\xff\xff\xff\x7fx.",
        b"\x80\x02\x8b\xff\xff\xff\x7fx.",
        b"\x80\x02Nr\xff\xff\xff\xff.",  # a memo of four billion entries
        b"\x80\x02Nq\x01h\x02.",
        b"\x80\x02t.",
        b"\x80\x02((u.",
        b"\x80\x02K\x01)R.",
        b"\x80\x02cos\nsystem\nK\x01R.",
        b"\x80\x02}]K\x01s.",  # a list is a key
        b"\x80\x02U\x05ab.",
        b"I" + b"9" * 5000 + b"\n.",
        b"\x80\x02\x82\x01.",  # the extension registry
        b"\x80\x02K\x01Q.",  # a persistent id where there is none
    ],
)
def test_malformed_bytes_are_one_kind_of_error(data: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(PickleError):
        unpickle(data)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_copies_do_not_multiply_what_a_pickle_holds() -> None:
    """One list of 4,000 items, copied 4,000 times by its constructor, would be 16 million items of 40 kB."""
    body = b"\x80\x02](" + b"K\x01" * 4000 + b"eq\x00]" + b"cbuiltins\ntuple\nh\x00\x85Ra" * 4000 + b"."
    with pytest.raises(PickleError, match="copies more items than it has bytes"):
        unpickle(body)


@given(st.data())
def test_damaged_pickles_raise_nothing_else(data: st.DataObject) -> None:
    good = pickle.dumps({"a": [1, 2.5, ("x", b"y")], "o": collections.OrderedDict(z=Plain())}, 2)
    flips = data.draw(st.lists(st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)), min_size=1, max_size=6))
    bad = bytearray(good[: data.draw(st.integers(1, len(good)))])
    for place, value in flips:
        if place < len(bad):
            bad[place] = value
    with contextlib.suppress(PickleError):
        unpickle(bytes(bad))


def test_random_bytes_raise_nothing_else() -> None:
    source = random.Random(7)
    for _ in range(3000):
        try:
            unpickle(source.randbytes(source.randrange(1, 60)))
        except PickleError:
            continue


def test_values_that_never_end_are_refused() -> None:
    cyclic: list[object] = []
    cyclic.append(cyclic)
    shared: list[object] = [0]
    for _ in range(60):
        shared = [shared, shared]
    wide = [list(range(1000))] * 1000
    deep: list[object] = []
    for _ in range(300):
        deep = [deep]
    for value in (cyclic, shared, wide, deep, {"a": cyclic}, {"a": (deep,)}):
        with pytest.raises(PickleError, match="nested more than 200 deep, or shared too often"):
            unpickle(pickle.dumps(value, 2))
    assert unpickle(pickle.dumps([[1, 2]] * 3, 2)) == [[1, 2]] * 3
