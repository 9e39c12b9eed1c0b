"""The routes, over real sockets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from orchestrator import wire
from orchestrator.core.status import JobStatus

from .conftest import Served
from .host import STATUS

JOB = """
apiVersion: regrow.dev/v1alpha1
kind: TrainingJob
metadata: {{name: new}}
spec:
  entrypoint: {{script: {script}}}
  batch: {{global: 8}}
  checkpoint: {{uri: {folder}}}
"""

PROTECTED = [
    ("GET", "/metrics"),
    ("GET", "/v1/jobs"),
    ("POST", "/v1/jobs"),
    ("GET", "/v1/jobs/gpt"),
    ("GET", "/v1/jobs/gpt/events"),
    ("POST", "/v1/jobs/gpt/stop"),
    ("POST", "/v1/jobs/gpt/save"),
    ("POST", "/v1/jobs/gpt/nodes/node-1/drain"),
    ("POST", "/v1/jobs/gpt/nodes/node-1/undrain"),
    ("GET", "/v1/agents"),
    ("GET", "/"),
    ("GET", "/no/such/page"),
]


WRONG = ["Bearer wrong", "Bearer correct-horse-", "Bearer correct-hors", "Bearer cörrect", "Bearer", "correct-horse"]
WRONG += ["Basic correct-horse", "Bearer correct-horse x", "Bearer Correct-Horse"]


@pytest.mark.parametrize(("method", "path"), PROTECTED)
async def test_nothing_answers_without_the_token(served: Served, method: str, path: str) -> None:
    async with served.client(None) as client:
        for header in [None, *WRONG]:
            headers = {} if header is None else {b"Authorization": header.encode()}
            response = await client.request(method, path, headers=headers)
            assert response.status_code == 401, header
            assert "token" in response.json()["error"]
    assert served.host.calls == []


@pytest.mark.parametrize("token", [None, "wrong"])
async def test_no_websocket_without_the_token(served: Served, token: str | None) -> None:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    with pytest.raises(InvalidStatus) as refused:
        await connect(f"ws://127.0.0.1:{served.port}/v1/agents?node=node-1", additional_headers=headers, proxy=None)
    assert refused.value.response.status_code == 401


async def test_health_needs_no_token(served: Served) -> None:
    async with served.client(None) as client:
        assert (await client.get("/healthz")).text == "ok\n"


async def test_status_of_jobs(served: Served) -> None:
    async with served.client() as client:
        jobs = (await client.get("/v1/jobs")).json()["jobs"]
        one = (await client.get("/v1/jobs/gpt")).json()
    assert jobs == [one]
    assert wire.from_data(one, JobStatus) == STATUS


async def test_metrics_are_prometheus_text(served: Served) -> None:
    async with served.client() as client:
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert {one.name: one.samples[0].value for one in text_string_to_metric_families(response.text)} == {
        "regrow_step": 3
    }


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/v1/jobs/other", 404, "no job is called other"),
        ("GET", "/v1/jobs/other/events", 404, "no job is called other"),
        ("POST", "/v1/jobs/other/stop", 404, "no job is called other"),
        ("POST", "/v1/jobs/other/nodes/node-1/drain", 404, "no job is called other"),
        ("POST", "/v1/jobs/gpt/nodes/node-9/drain", 404, "its nodes are node-1"),
        ("POST", "/v1/jobs/gpt/nodes/node-9/undrain", 404, "its nodes are node-1"),
        ("GET", "/v1/jobs/gpt/events?interval_s=0", 400, "between 0.01 and 60"),
        ("GET", "/v1/jobs/gpt/events?interval_s=nan", 400, "between 0.01 and 60"),
        ("GET", "/v1/jobs/gpt/events?interval_s=often", 400, "between 0.01 and 60"),
        ("GET", "/v1/nothing", 404, "no GET /v1/nothing here"),
        ("DELETE", "/v1/jobs/gpt", 405, "no DELETE /v1/jobs/gpt here"),
    ],
)
async def test_errors_are_one_sentence(served: Served, method: str, path: str, status: int, words: str) -> None:
    async with served.client() as client:
        response = await client.request(method, path)
    assert response.status_code == status
    assert words in response.json()["error"]
    assert served.host.calls == []


async def test_orders_reach_the_controller(served: Served) -> None:
    async with served.client() as client:
        for path in ("/nodes/node-1/drain", "/nodes/node-1/undrain", "/save", "/stop"):
            assert (await client.post(f"/v1/jobs/gpt{path}")).status_code == 202
    assert served.host.calls == [
        ("drain", "gpt", "node-1"),
        ("undrain", "gpt", "node-1"),
        ("save", "gpt"),
        ("stop", "gpt"),
    ]


async def test_a_job_file_is_submitted(served: Served, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.touch()
    served.host.current = None
    async with served.client() as client:
        response = await client.post("/v1/jobs", content=JOB.format(script=script, folder=tmp_path / "ckpt"))
        assert (response.status_code, response.json()) == (201, {"name": "new"})
        served.host.current = STATUS
        response = await client.post("/v1/jobs", content=JOB.format(script=script, folder=tmp_path / "ckpt"))
        assert (response.status_code, response.json()) == (409, {"error": "job gpt is active"})
    assert served.host.calls == [("submit", "new")]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1, 2]", b"kind: [", b"\xff\xfe", b"spec: {}", json.dumps({"spec": {"nodez": 1}}).encode()]
)
async def test_a_bad_job_file_is_400(served: Served, body: bytes) -> None:
    served.host.current = None
    async with served.client() as client:
        response = await client.post("/v1/jobs", content=body)
    assert response.status_code == 400
    assert "\n" not in response.json()["error"]
    assert served.host.calls == []


async def test_a_body_that_is_too_long_is_refused(served: Served) -> None:
    async with served.client() as client:
        response = await client.post("/v1/jobs", content=b"#" * ((1 << 20) + 1))
    assert response.status_code == 413
    assert "1048576 bytes" in response.json()["error"]


async def test_a_defect_shows_no_traceback(served: Served) -> None:
    served.host.broken = True
    async with served.client() as client:
        response = await client.get("/v1/jobs/gpt")
    assert response.status_code == 500
    assert "ZeroDivisionError" in response.json()["error"]
    assert "secret" not in response.text
    assert "Traceback" not in response.text
