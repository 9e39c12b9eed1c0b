"""Manifests: what is written reads back; whatever else is read is found out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.checkpoint.layout import Box
from orchestrator.checkpoint.manifest import (
    Manifest,
    PartChunk,
    PartEntry,
    PartManifest,
    PartTensor,
    decode_manifest,
    decode_part,
    directory_name,
    encode_manifest,
    encode_part,
    parse_directory_name,
)
from orchestrator.core.errors import CorruptCheckpoint

DIGEST = "0123456789abcdef" * 2
PART = PartManifest(
    generation=3,
    step=40,
    rank=1,
    world_size=2,
    file_bytes=144,
    header_bytes=80,
    header_digest=DIGEST,
    tensors=(
        PartTensor("w", None, "parameter", "F32", (4, 4), (PartChunk(Box((0, 0), (2, 4)), 80, 112, DIGEST),)),
        PartTensor(
            "w",
            "exp_avg",
            "state",
            "F32",
            (4, 4),
            (PartChunk(Box((2, 0), (1, 4)), 112, 128, DIGEST), PartChunk(Box((3, 0), (1, 4)), 128, 144, DIGEST)),
        ),
        PartTensor("none", None, "buffer", "U8", (0,), ()),
    ),
    state={"param_groups": [{"lr": 0.1, "params": ["w"]}]},
)
MANIFEST = Manifest(3, 40, 1.5, (PartEntry(0, DIGEST, 10), PartEntry(1, DIGEST[::-1], 20)))


def test_round_trip() -> None:
    assert decode_part(encode_part(PART), "f") == PART
    assert decode_manifest(encode_manifest(MANIFEST), "f") == MANIFEST
    assert MANIFEST.size_bytes == 30


@pytest.mark.parametrize(("step", "generation"), [(0, 0), (40, 3), (123456789, 12345)])
def test_directory_names(step: int, generation: int) -> None:
    assert parse_directory_name(directory_name(step, generation)) == (step, generation)


@pytest.mark.parametrize(
    "name",
    [
        "step-00000040-gen-0003/",
        "step-00000040-gen-0003\n",
        "../step-00000040-gen-0003",
        "step-000000040-gen-0003",
        "step-0000004٣-gen-0003",
        "manifest.json",
    ],
)
def test_other_directory_names(name: str) -> None:
    assert parse_directory_name(name) is None


def edit(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return apply


CHUNK = ("tensors", 1, "chunks", 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edit("format", value="regrow-checkpoint"), "format is 'regrow-checkpoint'"),
        (edit("version", value=2), "version is 2 where 1 is expected"),
        (edit("version", value=True), "version is True"),
        (edit("rank", value=1.0), "rank is 1.0"),
        (edit("rank", value=True), "rank is True"),
        (edit("step", value=-1), "step is -1"),
        (edit("file_bytes", value=2**63), "file_bytes is"),
        (edit("file_bytes", value=145), "its chunks end at byte 144 of 145"),
        (edit("header_bytes", value=0), "at tensor w: its byte range 80..112 should begin at 0"),
        (edit("header_digest", value="x" * 32), "where a checksum is expected"),
        (edit("tensors", value={}), "tensors is {}"),
        (edit("tensors", value=[7]), "tensors holds 7"),
        (edit("tensors", 0, "parameter", value=7), "parameter is 7"),
        (edit("tensors", 0, "kind", value="state"), "at tensor w: kind 'state' does not fit"),
        (edit("tensors", 0, "dtype", value="F4096"), "at tensor w: dtype 'F4096' is unknown"),
        (edit("tensors", 0, "shape", value=[4, "4"]), "at tensor w: shape is"),
        (edit("tensors", 0, "shape", value=[1] * 65), "at tensor w: it has 65 dimensions"),
        (edit("tensors", 0, "shape", value=[1, 4]), r"at tensor w: a chunk with offsets \[0, 0\] and sizes \[2, 4\]"),
        (edit("tensors", 0, "shape", value=[4, 4, 1]), "at tensor w: a chunk with offsets"),
        (edit(*CHUNK, "sizes", value=[2**40, 2**40]), r"at tensor w\.exp_avg: a chunk"),
        (edit(*CHUNK, "sizes", value=[0, 4]), r"at tensor w\.exp_avg: chunk \[2:2, 0:4\] has the byte range"),
        (edit(*CHUNK, "end", value=2**62), r"at tensor w\.exp_avg: chunk .* which does not fit"),
        (edit(*CHUNK, "begin", value=0), r"at tensor w\.exp_avg: chunk .* which does not fit"),
        (edit("tensors", 0, "chunks", 0, value={}), "at tensor w: it lacks offsets"),
        (edit("tensors", 0, "state", value="exp_avg"), "does not fit"),
        (edit("tensors", 2, "parameter", value="w"), "at tensor w: it is listed twice"),
        (edit("state", value=[]), r"state is \[\]"),
        (edit("state", "param_groups", value={}), "not a list of objects"),
        (edit("state", "param_groups", value=[1]), "not a list of objects"),
        (edit("state", "param_groups", 0, "params", value=[[]]), "do not list parameter names"),
    ],
)
def test_a_part_manifest_that_does_not_hold_together(change: Callable[[Any], None], words: str) -> None:
    data = json.loads(encode_part(PART))
    change(data)
    with pytest.raises(CorruptCheckpoint, match=f"checkpoint file part-00001.json is corrupt.*{words}"):
        decode_part(json.dumps(data).encode(), "part-00001.json")


def test_overlapping_byte_ranges_are_found() -> None:
    data = json.loads(encode_part(PART))
    second = data["tensors"][1]["chunks"]
    second[0]["begin"], second[0]["end"] = second[1]["begin"], second[1]["end"]
    with pytest.raises(CorruptCheckpoint, match=r"at tensor w\.exp_avg: its byte range 128..144 should begin at 112"):
        decode_part(json.dumps(data).encode(), "f")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"\x00" * 64,
        b"[" * 100_000,
        b'{"format":' + b"9" * 5000 + b"}",
        b'{"a":1,"a":2}',
    ],
)
def test_what_is_no_object_at_all(text: bytes) -> None:
    for decode in (decode_part, decode_manifest):
        with pytest.raises(CorruptCheckpoint, match="checkpoint file f is corrupt"):
            decode(text, "f")


def test_the_commit_manifest_is_under_its_own_checksum() -> None:
    data = json.loads(encode_manifest(MANIFEST))
    data["seconds"] = 2.5
    with pytest.raises(CorruptCheckpoint, match="its checksum does not match"):
        decode_manifest(json.dumps(data).encode(), "f")


@pytest.mark.parametrize("ranks", [[], [1], [0, 0], [0, 2], [1, 0]])
def test_the_commit_manifest_has_one_part_per_rank(ranks: list[int]) -> None:
    text = encode_manifest(Manifest(1, 1, 0.0, tuple(PartEntry(rank, DIGEST, 1) for rank in ranks)))
    with pytest.raises(CorruptCheckpoint, match="not one per rank"):
        decode_manifest(text, "f")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None)
@given(st.data())
def test_no_edit_of_a_part_manifest_gets_further_than_corrupt_checkpoint(data: st.DataObject) -> None:
    """Whatever is put anywhere: it is refused, or what is accepted keeps the invariants that readers rely on."""
    body = copy.deepcopy(json.loads(encode_part(PART)))
    node: Any = body
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = data.draw(ANYTHING)
    try:
        part = decode_part(json.dumps(body).encode(), "f")
    except CorruptCheckpoint:
        return
    chunks = sorted((chunk.begin, chunk.end) for tensor in part.tensors for chunk in tensor.chunks)
    assert [begin for begin, _ in chunks] == [part.header_bytes, *(end for _, end in chunks)][: len(chunks)]
    assert all(chunk.box.inside(tensor.shape) for tensor in part.tensors for chunk in tensor.chunks)
