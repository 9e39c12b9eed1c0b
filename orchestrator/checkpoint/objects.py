"""Checkpoints in object stores and on web servers, read by ranges: `s3://`, `gs://`, `az://`, `https://`.

obstore does the requests (signing, retries, pooled connections) and is imported here alone. It takes credentials,
region and endpoint from the environment, under the providers' own names: `AWS_ACCESS_KEY_ID`, `AWS_REGION`,
`AWS_ENDPOINT_URL`, `GOOGLE_SERVICE_ACCOUNT`, `AZURE_STORAGE_ACCOUNT_NAME`, ...
"""

from __future__ import annotations

import mmap
import os
import re
import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import unquote, urlsplit

from orchestrator.checkpoint.fields import corrupt
from orchestrator.core.errors import CheckpointError, InvalidInput

SCHEMES = ("s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss", "http", "https")
"""What a location in an object store begins with."""
LEAST_BYTES = 64 << 10
"""Smallest range that is asked for: a request takes as long for one byte as for these."""
WHOLE_BYTES = 1 << 20
"""Objects up to this size are fetched whole at their first read."""
AHEAD_BYTES = 8 << 20
"""Largest range of a request; what is read in order is fetched ahead in ranges that grow up to it."""
CACHE_BYTES = 64 << 20
"""Fetched ranges that are kept; those used longest ago go first."""
MAX_OBJECTS = 1_000_000
"""A location with more objects is not one checkpoint."""
MAX_STREAMS = 1024
"""Places remembered as the ends of reads, where the next read of the same reader would begin."""
ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT")


@dataclass(frozen=True, slots=True)
class _Object:
    size_bytes: int
    tag: str | None
    changed: str


def objects_at(url: str) -> ObjectFiles:
    """The objects below a URL, or the one object that it names.

    Raises `InvalidInput` for a URL that is none, `CheckpointError` when nothing is there, the store does not answer or
    refuses, or obstore is not installed.
    """
    scheme, host = urlsplit(url)[:2]
    if scheme not in SCHEMES or not host:
        raise InvalidInput(f"{url!r} is no location in an object store: give one like s3://bucket/folder")
    if scheme in ("http", "https"):  # few web servers list folders, all answer for one file
        return _single(url) or _below(url)
    files = _below(url)
    if files.names():
        return files
    found = _single(url)
    if found is None:
        raise CheckpointError(f"{url} does not exist: give the folder or file of a checkpoint")
    return found


def _below(url: str) -> ObjectFiles:
    return ObjectFiles(_store(url), url.rstrip("/"))


def _single(url: str) -> ObjectFiles | None:
    """The one object at the URL, if there is one."""
    folder, _, name = url.rstrip("/").rpartition("/")
    if not name or folder.endswith(("/", ":")):
        return None
    files = ObjectFiles(_store(folder), folder, only=unquote(name))
    try:
        files.size(unquote(name))
    except CheckpointError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    return files


def _store(url: str) -> Any:
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError as error:
        raise CheckpointError(
            f"{url} is read with the obstore package, which is not installed: pip install 'regrow[objects]'"
        ) from error
    plain = url.startswith("http://") or any(os.environ.get(name, "").startswith("http://") for name in ENDPOINTS)
    options = {"connect_timeout": "5s", "timeout": "120s", "allow_http": plain}
    retries = {"max_retries": 4, "retry_timeout": timedelta(seconds=60)}
    make: Any = from_url  # its overloads want the options of one provider
    try:
        return make(url, client_options=options, retry_config=retries)
    except (BaseError, ValueError) as error:
        raise _failure(error, url) from error


class ObjectFiles:
    """The objects below `location`, or `only` one of them. `bytes_read` and `requests` count, for benchmarks.

    All reads see the objects as they were when they were listed: one that changes afterwards is an error.
    """

    def __init__(self, store: Any, location: str, only: str | None = None) -> None:
        self.bytes_read = 0
        self.requests = 0
        self._store = store
        self._location = location
        self._only = only
        self._objects: dict[str, _Object] | None = None
        self._windows: OrderedDict[tuple[str, int], memoryview] = OrderedDict()
        self._begins: dict[str, list[int]] = {}
        self._cached_bytes = 0
        self._next: OrderedDict[tuple[str, int], int] = OrderedDict()
        self._lock = threading.Lock()
        self._listing = threading.Lock()

    @property
    def location(self) -> str:
        """The URL of the folder or object."""
        return self._location if self._only is None else f"{self._location}/{self._only}"

    def names(self) -> frozenset[str]:
        """All objects below the location; listed once."""
        return frozenset(self._listed())

    def size(self, file: str) -> int:
        """Bytes of the object."""
        return self._object(file).size_bytes

    def version(self, file: str) -> str:
        """The object's tag, or its size and time of change where the store gives none."""
        found = self._object(file)
        return found.tag or f"{found.size_bytes}-{found.changed}"

    def read_into(self, file: str, begin: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `begin` on, from what was fetched before or in requests of its own."""
        target = target.cast("B")
        found = self._object(file)
        if begin + target.nbytes > found.size_bytes:
            raise corrupt(self.label(file), f"it ends at byte {found.size_bytes}")
        done = 0
        while done < target.nbytes:
            at = begin + done
            window = self._cached(file, at)
            if window is None:
                window = self._fetch(file, found, at, target.nbytes - done)
            count = min(window.nbytes, target.nbytes - done)
            target[done : done + count] = window[:count]
            done += count
        self._expect(file, begin + done)

    def span(self, file: str, begin: int, count: int) -> memoryview:
        """The bytes; many of them go through a nameless temporary file, so that they need not fit into memory."""
        if begin + count > self.size(file):
            raise corrupt(self.label(file), f"it ends at byte {self.size(file)}")
        if count <= AHEAD_BYTES:
            data = memoryview(bytearray(count))
            self.read_into(file, begin, data)
            return data.toreadonly()
        with tempfile.TemporaryFile() as spool:
            spool.truncate(count)
            mapped = mmap.mmap(spool.fileno(), count)
        for start in range(0, count, AHEAD_BYTES):
            self.read_into(file, begin + start, memoryview(mapped)[start : start + AHEAD_BYTES])
        return memoryview(mapped).toreadonly()

    def label(self, file: str) -> str:
        """The object with its folder's name."""
        return f"{self._location.rsplit('/', 1)[-1]}/{file}"

    # ------------------------------------------------------------ which objects there are

    def _object(self, file: str) -> _Object:
        found = self._listed().get(file)
        if found is None:
            raise corrupt(self.label(file), "it is missing") from FileNotFoundError(file)
        return found

    def _listed(self) -> dict[str, _Object]:
        with self._listing:
            if self._objects is None:
                self._objects = self._list() if self._only is None else self._head(self._only)
            return self._objects

    def _list(self) -> dict[str, _Object]:
        import obstore

        found: dict[str, _Object] = {}
        try:
            for page in obstore.list(self._store, chunk_size=1000):
                found |= {entry["path"]: _described(entry) for entry in page if not entry["path"].endswith("/")}
                if len(found) > MAX_OBJECTS:
                    raise CheckpointError(
                        f"{self.location} has more than {MAX_OBJECTS} objects: give the folder of one checkpoint"
                    )
        except (obstore.exceptions.BaseError, OSError, ValueError) as error:
            raise _failure(error, self.location) from error
        return found

    def _head(self, name: str) -> dict[str, _Object]:
        import obstore

        try:
            return {name: _described(obstore.head(self._store, name))}
        except (obstore.exceptions.BaseError, OSError, ValueError) as error:
            raise _failure(error, self.location) from error

    # ------------------------------------------------------------ fetching

    def _cached(self, file: str, at: int) -> memoryview | None:
        """What is kept of the object from byte `at` on."""
        with self._lock:
            for begin in self._begins.get(file, ()):
                window = self._windows[file, begin]
                if begin <= at < begin + window.nbytes:
                    self._windows.move_to_end((file, begin))
                    return window[at - begin :]
        return None

    def _fetch(self, file: str, found: _Object, at: int, count: int) -> memoryview:
        """At least one byte from `at` on, by one request for what this and the next reads are likely to need."""
        with self._lock:
            ahead = self._next.pop((file, at), 0)
        begin, end = at, at + min(max(count, LEAST_BYTES, 2 * ahead), AHEAD_BYTES)
        if found.size_bytes <= WHOLE_BYTES:
            begin, end = 0, found.size_bytes
        elif end > found.size_bytes:  # the directories of archives are at their ends, and are read backwards
            begin, end = min(at, found.size_bytes - LEAST_BYTES), found.size_bytes
        data = self._request(file, found, begin, end)
        with self._lock:
            self._keep(file, begin, data)
            self._expect_locked(file, end, end - begin)
        return data[at - begin :]

    def _request(self, file: str, found: _Object, begin: int, end: int) -> memoryview:
        import obstore

        options: dict[str, Any] = {"range": (begin, end)}
        if found.tag is not None and not found.tag.startswith("W/"):
            options["if_match"] = found.tag
        try:
            data = memoryview(obstore.get(self._store, file, options=options).bytes()).cast("B")  # type: ignore[arg-type]
        except FileNotFoundError as error:
            raise corrupt(self.label(file), "it is missing") from error
        except obstore.exceptions.PreconditionError as error:
            raise CheckpointError(
                f"{self._location}/{file} changed while it was read: read the checkpoint again"
            ) from error
        except (obstore.exceptions.BaseError, OSError, ValueError) as error:
            raise _failure(error, f"{self._location}/{file}") from error
        if data.nbytes != end - begin:
            raise corrupt(self.label(file), f"it ends at byte {begin + data.nbytes}")
        with self._lock:
            self.requests += 1
            self.bytes_read += data.nbytes
        return data

    def _keep(self, file: str, begin: int, data: memoryview) -> None:
        if (file, begin) in self._windows:  # another thread was as quick
            self._forget((file, begin))
        self._windows[file, begin] = data
        self._begins.setdefault(file, []).append(begin)
        self._cached_bytes += data.nbytes
        while self._cached_bytes > CACHE_BYTES:
            self._forget(next(iter(self._windows)))

    def _forget(self, key: tuple[str, int]) -> None:
        self._cached_bytes -= self._windows.pop(key).nbytes
        self._begins[key[0]].remove(key[1])

    def _expect(self, file: str, end: int) -> None:
        """A read that begins where another ended is taken for the same reader going on."""
        with self._lock:
            if (file, end) not in self._next:
                self._expect_locked(file, end, LEAST_BYTES)

    def _expect_locked(self, file: str, end: int, fetched: int) -> None:
        self._next[file, end] = fetched
        if len(self._next) > MAX_STREAMS:
            self._next.popitem(last=False)


def _described(entry: Any) -> _Object:
    return _Object(int(entry["size"]), entry["e_tag"], str(entry["last_modified"]))


_REASONS = (
    (
        r"NoSuchBucket|specified bucket does not exist|ContainerNotFound|specified container does not exist",
        "its bucket does not exist: check the name",
    ),
    (
        r"PermanentRedirect|AuthorizationHeaderMalformed|redirect without LOCATION|IllegalLocationConstraint",
        "its bucket is in another region: set AWS_REGION to that",
    ),
    (
        r"169\.254\.169\.254|metadata\.google|Missing(AccessKeyId|SecretAccessKey)|Missing AccessKeyId"
        r"|Missing SecretAccessKey|TokenRequest|token request",
        "no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (s3), GOOGLE_SERVICE_ACCOUNT (gs) "
        "or AZURE_STORAGE_ACCOUNT_KEY (az), or AWS_SKIP_SIGNATURE=true for a public bucket",
    ),
    (r"Account must be specified", "its account is unknown: set AZURE_STORAGE_ACCOUNT_NAME"),
    (
        r"\b40[13] |AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|privileges",
        "access is refused: give credentials that may list and read it",
    ),
    (r"PROPFIND", "its web server lists no folders: give the URL of one file"),
    (r"Unable to recognise URL|Unrecognised", "it is no location of an object store: give one like s3://bucket/folder"),
    (r"builder error", "its endpoint is not encrypted: set AWS_ALLOW_HTTP=true to use it"),
    (r"error sending request|HTTP error", "its store does not answer: check the network and the endpoint"),
)


def _failure(error: Exception, where: str) -> CheckpointError:
    """The store's many words as one sentence; the cause keeps them."""
    text = str(error).split("\n\nDebug source", 1)[0]
    if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in text:
        return CheckpointError(f"{where} does not exist: give the folder or file of a checkpoint")
    for pattern, reason in _REASONS:
        if re.search(pattern, text):
            return CheckpointError(f"{where} cannot be read because {reason}")
    words = " ".join(text.split())
    return CheckpointError(f"{where} cannot be read ({words[:200]}): check the location and the store")
