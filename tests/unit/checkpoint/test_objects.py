"""Checkpoints in object stores, against a real S3-compatible server."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import obstore
import pytest
from obstore.store import S3Store

from orchestrator.checkpoint import objects
from orchestrator.checkpoint.convert import Conversion, convert
from orchestrator.checkpoint.files import Files, LocalFiles, read_whole
from orchestrator.checkpoint.formats import open_checkpoint
from orchestrator.checkpoint.location import files_at
from orchestrator.checkpoint.objects import ObjectFiles
from orchestrator.checkpoint.verify import prove, verify_any
from orchestrator.core.errors import CheckpointError, CorruptCheckpoint, InvalidInput
from tests.object_store.server import running
from tests.unit.checkpoint.formats import universal_layout
from tests.unit.checkpoint.samples import contents
from tests.unit.checkpoint.saving import MOMENT, WEIGHT, save, write_all

BUCKET = "checkpoints"
LEAST_BYTES, WHOLE_BYTES, AHEAD_BYTES = 4 << 10, 64 << 10, 512 << 10
"""Smaller than in use, so that little data shows the same."""


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "LEAST_BYTES", LEAST_BYTES)
    monkeypatch.setattr(objects, "WHOLE_BYTES", WHOLE_BYTES)
    monkeypatch.setattr(objects, "AHEAD_BYTES", AHEAD_BYTES)
    monkeypatch.setattr(objects, "CACHE_BYTES", 8 * AHEAD_BYTES)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running() as url:
        yield url


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """A store of the bucket, which has the environment's credentials, as a user's shell would give them."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    make_bucket(server)
    return S3Store(BUCKET, client_options={"allow_http": True})


def make_bucket(server: str) -> None:
    import http.client

    connection = http.client.HTTPConnection(server.removeprefix("http://"))
    connection.request("PUT", f"/{BUCKET}")
    connection.getresponse().read()
    connection.close()


def put(store: S3Store, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        obstore.put(store, name, data)


def objects_of(location: str) -> ObjectFiles:
    files = files_at(location)
    assert isinstance(files, ObjectFiles)
    return files


def read(files: Files, name: str, begin: int, count: int) -> bytes:
    out = bytearray(count)
    files.read_into(name, begin, memoryview(out))
    return bytes(out)


def test_names_and_sizes_are_those_below_the_folder(bucket: S3Store) -> None:
    put(bucket, {"run/step-1/a.bin": b"abc", "run/step-1/sub/b c#%.bin": b"defg", "run/step-10/x": b"no"})
    files = files_at(f"s3://{BUCKET}/run/step-1/")
    assert files.names() == {"a.bin", "sub/b c#%.bin"}
    assert files.size("sub/b c#%.bin") == 4
    assert read_whole(files, "sub/b c#%.bin") == b"defg"
    assert files.location == f"s3://{BUCKET}/run/step-1"
    assert files.label("a.bin") == "step-1/a.bin"


def test_one_object_stands_for_itself(bucket: S3Store) -> None:
    put(bucket, {"one/model.safetensors": b"0123456789", "one/other": b"x"})
    files = files_at(f"s3://{BUCKET}/one/model.safetensors")
    assert files.names() == {"model.safetensors"}
    assert read(files, "model.safetensors", 3, 4) == b"3456"


@pytest.mark.parametrize("size", [0, 1, LEAST_BYTES, WHOLE_BYTES, WHOLE_BYTES + 1, 3 * AHEAD_BYTES + 7])
def test_reads_the_bytes_of_any_range(bucket: S3Store, size: int) -> None:
    data = os.urandom(size)
    put(bucket, {"ranges/data": data})
    files = files_at(f"s3://{BUCKET}/ranges")
    cuts = sorted(
        {0, size, *(min(size, cut) for cut in (1, 22, LEAST_BYTES - 1, size // 3, size // 2, size - 22))} - {-22}
    )
    for begin in (cut for cut in cuts if cut >= 0):
        for end in (cut for cut in cuts if cut >= begin):
            assert read(files, "data", begin, end - begin) == data[begin:end]
            assert files.span("data", begin, end - begin) == data[begin:end]


def test_reading_in_order_fetches_ahead_and_everything_once(bucket: S3Store) -> None:
    size = 4 * AHEAD_BYTES
    data = os.urandom(size)
    put(bucket, {"order/data": data})
    files = objects_of(f"s3://{BUCKET}/order")
    step = 6_000
    assert b"".join(read(files, "data", at, min(step, size - at)) for at in range(0, size, step)) == data
    assert files.requests <= 14  # ranges growing twofold to 512 KiB, not one for each of the 350 reads
    assert files.bytes_read <= size + LEAST_BYTES


def test_neighbouring_small_reads_share_a_request(bucket: S3Store) -> None:
    data = os.urandom(2 * WHOLE_BYTES)
    put(bucket, {"small/data": data, "small/tiny": b"0123456789"})
    files = objects_of(f"s3://{BUCKET}/small")
    for at in (2 * WHOLE_BYTES - 22, 2 * WHOLE_BYTES - 900, 2 * WHOLE_BYTES - 4000):  # as archives are opened
        assert read(files, "data", at, 20) == data[at : at + 20]
    assert files.requests == 1
    assert [read(files, "tiny", at, 1) for at in (9, 0, 5)] == [b"9", b"0", b"5"]
    assert files.requests == 2


def test_what_is_kept_is_bounded(bucket: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "CACHE_BYTES", 3 * LEAST_BYTES)
    data = os.urandom(WHOLE_BYTES + 20 * LEAST_BYTES)
    put(bucket, {"bounded/data": data})
    files = objects_of(f"s3://{BUCKET}/bounded")
    for at in range(0, len(data) - 10, 3 * LEAST_BYTES // 2):
        assert read(files, "data", at, 10) == data[at : at + 10]
        assert files._cached_bytes == sum(window.nbytes for window in files._windows.values()) <= 3 * LEAST_BYTES


def test_threads_may_share_it(bucket: S3Store) -> None:
    data = os.urandom(AHEAD_BYTES + 12_345)
    put(bucket, {"threads/data": data})
    files = files_at(f"s3://{BUCKET}/threads")

    def one(index: int) -> bool:
        at = index * 7919 % (len(data) - 4_000)
        return read(files, "data", at, 4_000) == data[at : at + 4_000]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(100)))


def test_a_span_is_the_bytes_whether_it_is_kept_in_memory_or_not(bucket: S3Store) -> None:
    data = os.urandom(2 * AHEAD_BYTES + 5)
    put(bucket, {"span/data": data})
    files = files_at(f"s3://{BUCKET}/span")
    span = files.span("data", 3, 2 * AHEAD_BYTES)
    assert span.readonly and span == data[3 : 3 + 2 * AHEAD_BYTES]


def test_a_missing_object_is_corrupt(bucket: S3Store) -> None:
    put(bucket, {"missing/a": b"x" * 10, "missing/b": b"y"})
    files = files_at(f"s3://{BUCKET}/missing")
    with pytest.raises(CorruptCheckpoint, match="missing/c is corrupt: it is missing"):
        files.size("c")
    assert files.size("a") == 10
    obstore.delete(bucket, "missing/a")
    with pytest.raises(CorruptCheckpoint, match="missing/a is corrupt: it is missing"):
        read(files, "a", 0, 10)


def test_reading_beyond_the_end_is_corrupt(bucket: S3Store) -> None:
    put(bucket, {"short/a": b"x" * 10})
    files = files_at(f"s3://{BUCKET}/short")
    for begin, count in ((5, 6), (11, 1), (1 << 62, 1)):
        with pytest.raises(CorruptCheckpoint, match="short/a is corrupt: it ends at byte 10"):
            read(files, "a", begin, count)
        with pytest.raises(CorruptCheckpoint, match="it ends at byte 10"):
            files.span("a", begin, count)


def test_an_object_that_changes_is_not_mixed_with_what_it_was(bucket: S3Store) -> None:
    put(bucket, {"changing/a": b"x" * (2 * WHOLE_BYTES)})
    files = files_at(f"s3://{BUCKET}/changing")
    before = files.version("a")
    read(files, "a", 0, 10)
    put(bucket, {"changing/a": b"y" * (2 * WHOLE_BYTES)})
    with pytest.raises(CheckpointError, match="changed while it was read"):
        read(files, "a", WHOLE_BYTES, 10)
    assert files_at(f"s3://{BUCKET}/changing").version("a") != before


def test_nothing_there(bucket: S3Store) -> None:
    with pytest.raises(CheckpointError, match=f"s3://{BUCKET}/nowhere does not exist: give the folder or file"):
        files_at(f"s3://{BUCKET}/nowhere")


def test_no_such_bucket(bucket: S3Store) -> None:
    with pytest.raises(CheckpointError, match="s3://no-such-bucket/x cannot be read because its bucket does not exist"):
        files_at("s3://no-such-bucket/x")


def test_no_credentials(bucket: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(CheckpointError, match="because no credentials were found: set AWS_ACCESS_KEY_ID"):
        files_at(f"s3://{BUCKET}/x")


def test_store_that_is_not_there(bucket: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="its store does not answer: check the network and the endpoint"):
        files_at(f"s3://{BUCKET}/x")


@pytest.mark.parametrize("location", ["s3://", "s3:///x", "gs://", "https://"])
def test_no_location(bucket: S3Store, location: str) -> None:
    with pytest.raises(InvalidInput, match=f"'{location}' is no location in an object store"):
        files_at(location)


def test_every_failure_is_one_sentence(bucket: S3Store) -> None:
    for location in ("s3://no-such-bucket/x", f"s3://{BUCKET}/nowhere", "az://account-less/x"):
        with pytest.raises(CheckpointError) as caught:
            files_at(location)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_it_says_what_to_install(bucket: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(CheckpointError, match=r"pip install 'regrow\[objects\]'"):
        files_at(f"s3://{BUCKET}/x")


class Answer(BaseHTTPRequestHandler):
    """What a real store answers in cases that moto does not know, and a plain web server's files."""

    status, body, files = 200, b"", dict[str, bytes]()

    def do_GET(self) -> None:
        name = self.path.partition("?")[0]
        if name not in self.files:
            return self.answer(self.status, self.body)
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        data = self.files[name]
        piece = data[int(first) : int(last) + 1]
        return self.answer(206, piece, {"Content-Range": f"bytes {first}-{int(first) + len(piece) - 1}/{len(data)}"})

    def do_HEAD(self) -> None:
        name = self.path.partition("?")[0]
        self.answer(200 if name in self.files else 404, self.files.get(name, b""))

    def do_PROPFIND(self) -> None:
        self.answer(405, b"no")

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        fixed = {"Content-Length": str(len(body)), "Last-Modified": "Sun, 22 Nov 2026 10:00:00 GMT"}
        for name, value in (fixed | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (301, b"<Error><Code>PermanentRedirect</Code></Error>", "another region: set AWS_REGION"),
        (400, b"<Error><Code>AuthorizationHeaderMalformed</Code></Error>", "another region: set AWS_REGION"),
        (403, b"<Error><Code>InvalidAccessKeyId</Code></Error>", "access is refused: give credentials"),
        (418, b"<Error>\n\n<Code>Teapot</Code></Error>", r"\(.*418.*\): check the location and the store"),
    ],
)
def test_answers_that_only_the_real_store_gives(
    bucket: S3Store, web: str, monkeypatch: pytest.MonkeyPatch, status: int, body: bytes, words: str
) -> None:
    monkeypatch.setattr(Answer, "status", status)
    monkeypatch.setattr(Answer, "body", body)
    monkeypatch.setenv("AWS_ENDPOINT_URL", web)
    with pytest.raises(CheckpointError, match=words) as caught:
        files_at(f"s3://{BUCKET}/x")
    assert "\n" not in str(caught.value)


def test_one_file_of_a_web_server(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(2 * WHOLE_BYTES)
    monkeypatch.setattr(Answer, "files", {"/models/m.safetensors": data})
    files = files_at(f"{web}/models/m.safetensors")
    assert files.names() == {"m.safetensors"}
    assert read(files, "m.safetensors", 17, WHOLE_BYTES) == data[17 : 17 + WHOLE_BYTES]
    with pytest.raises(CheckpointError, match="its web server lists no folders: give the URL of one file"):
        files_at(f"{web}/models").names()


def test_local_files_answer_alike(bucket: S3Store, tmp_path: Path) -> None:
    (tmp_path / "alike").mkdir()
    (tmp_path / "alike" / "a").write_bytes(b"0123456789")
    put(bucket, {"alike/a": b"0123456789"})
    local, remote = LocalFiles(tmp_path / "alike"), files_at(f"s3://{BUCKET}/alike")
    assert local.names() == remote.names() and local.size("a") == remote.size("a")
    assert local.label("a") == remote.label("a") and local.span("a", 2, 3) == remote.span("a", 2, 3)


def test_a_checkpoint_in_a_bucket_reads_as_the_one_it_was_copied_from(bucket: S3Store, tmp_path: Path) -> None:
    universal_layout.write(tmp_path, stage=1)
    upload(bucket, tmp_path, "same")
    here, there = open_checkpoint(tmp_path), open_checkpoint(f"s3://{BUCKET}/same")
    assert (there.state, there.aliases, there.frozen) == (here.state, here.aliases, here.frozen)
    assert contents(there) == contents(here)
    prove(there)
    files = there.files
    assert isinstance(files, ObjectFiles)
    assert files.requests <= len(files.names())  # small objects are fetched once, whole


def test_a_converted_bucket_is_the_converted_folder(bucket: S3Store, tmp_path: Path) -> None:
    universal_layout.write(tmp_path / "source", stage=3)
    upload(bucket, tmp_path / "source", "convert")
    convert(f"s3://{BUCKET}/convert", tmp_path / "there", Conversion())
    convert(tmp_path / "source", tmp_path / "here", Conversion())
    assert contents(open_checkpoint(tmp_path / "there")) == contents(open_checkpoint(tmp_path / "here"))


def test_a_missing_and_a_cut_off_object_of_a_checkpoint_are_named(bucket: S3Store, tmp_path: Path) -> None:
    folder = universal_layout.write(tmp_path, stage=1)
    upload(bucket, tmp_path, "damaged")
    location, name = f"s3://{BUCKET}/damaged", "damaged/step7_universal/zero/lift/exp_avg.pt"
    obstore.put(bucket, name, (folder / "zero/lift/exp_avg.pt").read_bytes()[:-100])
    with pytest.raises(CorruptCheckpoint, match=r"zero/lift/exp_avg\.pt is corrupt at tensor lift\.exp_avg"):
        contents(open_checkpoint(location))
    obstore.delete(bucket, name)
    with pytest.raises(CorruptCheckpoint, match=r"zero/lift/exp_avg\.pt is corrupt at tensor lift: it is missing"):
        open_checkpoint(location)


def upload(store: S3Store, folder: Path, prefix: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            obstore.put(store, f"{prefix}/{path.relative_to(folder)}", path.read_bytes())


def test_native_checkpoints_are_read_and_verified_in_a_bucket(bucket: S3Store, tmp_path: Path) -> None:
    for step in (30, 40):
        save(tmp_path, step=step)
    write_all(tmp_path, step=50)  # never committed
    upload(bucket, tmp_path, "job")
    root = f"s3://{BUCKET}/job"
    newest = open_checkpoint(root)
    assert (newest.source, newest.step, newest.generation) == ("native", 40, 3)
    assert contents(newest)["w"] == (WEIGHT + 40).tobytes()
    assert contents(newest)["w.exp_avg"] == MOMENT.tobytes()
    assert open_checkpoint(root, tag="30").step == open_checkpoint(f"{root}/step-00000030-gen-0003").step == 30
    verified = verify_any(root)
    assert (verified.tensors, verified.unproven) == (4, 0)
    with pytest.raises(CheckpointError, match="holds no committed checkpoint 50: choose one of the steps 40, 30"):
        open_checkpoint(root, tag="50")
    with pytest.raises(CheckpointError, match=r"there is no committed checkpoint at .*step-00000050-gen-0003"):
        open_checkpoint(f"{root}/step-00000050-gen-0003")
    convert(root, tmp_path / "universal", Conversion())
    assert contents(open_checkpoint(tmp_path / "universal")) == contents(newest)


def test_damage_of_a_native_checkpoint_in_a_bucket_is_found(bucket: S3Store, tmp_path: Path) -> None:
    name = save(tmp_path).path
    upload(bucket, tmp_path, "damaged")
    data = (tmp_path / name / "part-00001.safetensors").read_bytes()
    key = f"damaged/{name}/part-00001.safetensors"
    put(bucket, {key: data[:-1] + bytes([data[-1] ^ 1])})
    with pytest.raises(
        CorruptCheckpoint, match=r"part-00001\.safetensors is corrupt at tensor w.*: the bytes of chunk"
    ):
        verify_any(f"s3://{BUCKET}/damaged")
    put(bucket, {key: data[:-8]})
    with pytest.raises(CorruptCheckpoint, match=r"part-00001\.safetensors is corrupt at tensor w.*: it has \d+ bytes"):
        open_checkpoint(f"s3://{BUCKET}/damaged")
    obstore.delete(bucket, key)
    with pytest.raises(CorruptCheckpoint, match=r"part-00001\.safetensors is corrupt at tensor w.*: it is missing"):
        open_checkpoint(f"s3://{BUCKET}/damaged")
