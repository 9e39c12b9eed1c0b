"""Manifests: what is written reads back; whatever else is read is found out."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.checkpoint.fields import LARGEST, MAX_DEPTH
from orchestrator.checkpoint.layout import ITEM_BYTES, KINDS, Box
from orchestrator.checkpoint.manifest import (
    Manifest,
    PartEntry,
    PartManifest,
    decode_manifest,
    decode_part,
    directory_name,
    encode_manifest,
    encode_part,
    parse_directory_name,
)
from orchestrator.checkpoint.part_tensors import PartChunk, PartTensor, PartTensors
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


def grown(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """One value more at the end of a list."""

    def apply(data: Any) -> None:
        for key in path:
            data = data[key]
        data.append(value)

    return apply


def without(*path: Any) -> Callable[[dict[str, Any]], None]:
    def apply(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return apply


def both(*changes: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def apply(data: Any) -> None:
        for change in changes:
            change(data)

    return apply


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edit("format", value="regrow-checkpoint"), "format is 'regrow-checkpoint'"),
        (edit("version", value=1), "version is 1 where 2 is expected"),
        (edit("version", value=3), "version is 3 where 2 is expected"),
        (edit("version", value=True), "version is True"),
        (edit("rank", value=1.0), "rank is 1.0"),
        (edit("rank", value=True), "rank is True"),
        (edit("step", value=-1), "step is -1"),
        (edit("file_bytes", value=2**63), "file_bytes is"),
        (edit("file_bytes", value=145), "its chunks end at byte 144 of 145"),
        (edit("file_bytes", value=143), "its chunks end at byte 144 of 143"),
        (edit("header_bytes", value=0), "at tensor w: its byte range 80..112 should begin at 0"),
        (edit("header_digest", value="x" * 32), "where a checksum is expected"),
        # lists that are none, or hold what they should not
        *((edit(key, value=[]), rf"{key} is \[\]") for key in ("forms", "boxes", "tensors", "chunks")),
        *((without(key), f"it lacks {key}") for key in ("parameters", "forms", "boxes", "tensors", "chunks")),
        (edit("parameters", value={}), "parameters is {}"),
        (edit("parameters", 0, value=7), r"parameters is \[7, 'none'\]"),
        (edit("forms", "state", 0, value=7), "state is .* where a list of strings and nulls"),
        (edit("forms", "kind", 0, value=None), "kind is .* where a list of strings"),
        (edit("forms", "dtype", 0, value=None), "dtype is .* where a list of strings"),
        (edit("forms", "shape", 0, value=4), "shape holds 4 where a list of counts"),
        (edit("forms", "shape", 0, value={}), "shape holds {} where a list of counts"),
        (edit("boxes", "offsets", 0, value=None), "offsets holds None where a list of counts"),
        (edit("chunks", "digest", 0, value=7), "digest is .* where a list of strings"),
        (edit("tensors", "chunks", value="1"), "chunks is '1' where a list"),
        # numbers that are no counts
        *(
            (edit(*path, value=value), f"{path[-1] if isinstance(path[-1], str) else path[-2]} holds")
            for value in ("4", True, 1.0, 1e30, float("nan"), None, [], {}, -1, -(2**70), 2**63, 2**64, 10**30)
            for path in (
                ("tensors", "parameter", 0),
                ("tensors", "form", 0),
                ("tensors", "chunks", 0),
                ("chunks", "box", 0),
                ("chunks", "begin", 0),
            )
        ),
        *(
            (edit(group, key, 0, 0, value=value), f"{key} holds .* where a count is expected")
            for value in ("4", True, 1.0, None, [], {}, -1, 2**63, -(2**63) - 1, 10**30)
            for group, key in (("forms", "shape"), ("boxes", "offsets"), ("boxes", "sizes"))
        ),
        # columns that do not go together, or that nobody knows
        *(
            (edit(group, name, value=[]), f"{group} has a member '{name}', which is unknown")
            for group in ("forms", "boxes", "tensors", "chunks")
            for name in ("end", "")
        ),
        (grown("forms", "shape", value=[]), "columns of its forms have 3, 3, 3, 4 members"),
        *((grown("forms", key, value="F32"), r"columns of its forms have .*4.* members") for key in ("state", "kind")),
        (grown("forms", "dtype", value="F32"), "columns of its forms have 3, 3, 4, 3 members"),
        (grown("boxes", "offsets", value=[]), "columns of its boxes have 4, 3 members"),
        (grown("boxes", "sizes", value=[]), "columns of its boxes have 3, 4 members"),
        *((grown("tensors", key, value=0), "columns of its tensors have") for key in ("parameter", "form", "chunks")),
        *((grown("chunks", key, value=0), "columns of its chunks have") for key in ("box", "begin")),
        (grown("chunks", "digest", value=DIGEST), "columns of its chunks have 3, 3, 4 members"),
        (edit("tensors", "parameter", 0, value=2), "parameter holds 2 where a number below 2 is expected"),
        (edit("tensors", "form", 0, value=3), "form holds 3 where a number below 3 is expected"),
        (edit("chunks", "box", 0, value=2**63 - 1), "box holds 9223372036854775807 where a number below 3 is expected"),
        (edit("tensors", "chunks", value=[1, 1, 0]), "its tensors do not have the 3 chunks that it lists"),
        (edit("tensors", "chunks", value=[1, 3, 0]), "its tensors do not have the 3 chunks that it lists"),
        (edit("tensors", "chunks", value=[2**62, 2**62, 2**63 - 1]), "its tensors do not have the 3 chunks"),
        (edit("tensors", "chunks", value=[2**63 - 1, 2**63 - 1, 5]), "its tensors do not have the 3 chunks"),
        # tensors
        (edit("forms", "kind", 0, value="state"), "at tensor w: kind 'state' does not fit"),
        (edit("forms", "kind", 1, value="parameter"), r"at tensor w\.exp_avg: kind 'parameter' does not fit"),
        (edit("forms", "kind", 2, value="weight"), "at tensor none: kind 'weight' does not fit"),
        (edit("forms", "dtype", 0, value="F4096"), "at tensor w: dtype 'F4096' is unknown"),
        (edit("forms", "shape", 2, value=[0] * 65), "at tensor none: it has 65 dimensions"),
        (edit("forms", "state", 0, value="exp_avg"), "does not fit"),
        (edit("tensors", "parameter", 2, value=0), "at tensor w: it is listed twice"),
        (edit("parameters", 1, value="w"), "at tensor w: it is listed twice"),
        (edit("parameters", 1, value="w.exp_avg"), r"at tensor w\.exp_avg: it is listed twice"),
        # a form that no tensor has is still one of this format
        (
            both(
                *(
                    grown("forms", key, value=value)
                    for key, value in {"state": None, "kind": "x", "dtype": "F32"}.items()
                ),
                grown("forms", "shape", value=[]),
            ),
            ": kind 'x' does not fit",
        ),
        # boxes and bytes
        (edit("forms", "shape", 0, value=[1, 4]), r"at tensor w: a chunk with offsets \[0, 0\] and sizes \[2, 4\]"),
        (edit("forms", "shape", 0, value=[4, 4, 1]), "at tensor w: a chunk with offsets"),
        (edit("forms", "shape", 0, value=[]), r"at tensor w: a chunk .* is outside \[\]"),
        (edit("boxes", "offsets", 1, value=[2, 0, 0]), r"box 1 has the offsets \[2, 0, 0\] but the sizes \[1, 4\]"),
        (edit("boxes", "sizes", 1, value=[2**40, 2**40]), r"at tensor w\.exp_avg: a chunk"),
        (edit("boxes", "offsets", 1, value=[2**63 - 1, 0]), r"at tensor w\.exp_avg: a chunk"),
        (edit("boxes", "sizes", 1, value=[2**63 - 1, 4]), r"at tensor w\.exp_avg: a chunk"),
        (edit("boxes", "offsets", 1, value=[4, 0]), r"at tensor w\.exp_avg: a chunk"),
        (edit("boxes", "sizes", 1, value=[0, 4]), r"at tensor w\.exp_avg: chunk \[2:2, 0:4\] at byte 112 is empty"),
        (
            both(edit("forms", "shape", 1, value=[2**63 - 1] * 2), edit("boxes", "sizes", 1, value=[2**32, 2**32])),
            r"at tensor w\.exp_avg: chunk .* at byte 112 is empty or larger than any file",
        ),
        (
            both(edit("forms", "shape", 1, value=[2**63 - 1] * 2), edit("boxes", "sizes", 1, value=[2**31, 2**31 + 1])),
            r"at tensor w\.exp_avg: chunk .* at byte 112 is empty or larger than any file",
        ),
        (
            edit("chunks", "begin", 1, value=2**63 - 1),
            r"at tensor w\.exp_avg: chunk .* at byte 9223372036854775807 is",
        ),
        (edit("chunks", "begin", 1, value=0), r"at tensor w\.exp_avg: its byte range 0..16 should begin at 80"),
        (edit("chunks", "begin", 1, value=113), r"at tensor w\.exp_avg: its byte range 113..129 should begin at 112"),
        *(
            (
                edit("chunks", "digest", 1, value=value),
                r"at tensor w\.exp_avg: digest is .* where a checksum is expected",
            )
            for value in ("", DIGEST[1:], DIGEST + "0", DIGEST.upper(), DIGEST[:-2] + "  ", "x" * 32, "\u0663" * 32)
        ),
        (
            both(edit("chunks", "digest", 0, value=DIGEST[1:]), edit("chunks", "digest", 1, value=DIGEST + "0")),
            r"at tensor w: digest is .* where a checksum is expected",
        ),
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


def nested(depth: int) -> Any:
    value: Any = 0
    for at in range(depth):
        value = [value] if at % 2 else {"a": value}
    return value


@pytest.mark.parametrize("key", ["state", "remark"])
def test_depth_is_bounded_wherever_values_are_taken_as_they_are(key: str) -> None:
    data = json.loads(encode_part(PART))
    data[key] = {"deep": nested(MAX_DEPTH - 2)}
    decode_part(json.dumps(data).encode(), "f")
    data[key] = {"deep": nested(MAX_DEPTH - 1)}
    with pytest.raises(CorruptCheckpoint, match=f"nested more than {MAX_DEPTH} deep"):
        decode_part(json.dumps(data).encode(), "f")


def test_overlapping_byte_ranges_are_found() -> None:
    data = json.loads(encode_part(PART))
    data["chunks"]["begin"][1] = data["chunks"]["begin"][2]
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
    require_invariants(part)


def require_invariants(part: PartManifest[PartTensors]) -> None:
    chunks = sorted((chunk.begin, chunk.end) for tensor in part.tensors for chunk in tensor.chunks)
    assert [begin for begin, _ in chunks] == [part.header_bytes, *(end for _, end in chunks)][: len(chunks)]
    assert all(chunk.box.inside(tensor.shape) for tensor in part.tensors for chunk in tensor.chunks)
    assert [part.header_bytes, *(end for _, end in chunks)][-1] == part.file_bytes
    assert len({tensor.name for tensor in part.tensors}) == len(part.tensors)
    for tensor in part.tensors:
        assert tensor.kind in KINDS and (tensor.kind == "state") == (tensor.state is not None)
        assert all(type(size) is int and 0 <= size <= LARGEST for size in tensor.shape)
        for chunk in tensor.chunks:
            assert chunk.end - chunk.begin == chunk.box.elements * ITEM_BYTES[tensor.dtype] > 0
            assert re.fullmatch("[0-9a-f]{32}", chunk.digest)
            numbers = (*chunk.box.offsets, *chunk.box.sizes, chunk.begin, chunk.end)
            assert all(type(number) is int and 0 <= number <= LARGEST for number in numbers)
