"""`regrow plan --evaluate`: tables as users give them, what it answers, and what it keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.cli import main

ROWS = """\
row_id,model,seq,gpu,n_gpus,tp,pp,cp,fsdp,mbs,gbs,recompute,precision,tokens_per_s_per_gpu,mem_gib,oom
a,Llama-3.1-8B,8192,H100-SXM,8,1,1,1,8,2,16,selective-op,bf16,6667,77,
b,Llama-2-70B,4096,A100-80G,64,1,1,1,64,2,128,selective-op,bf16,,,1
c,Flux-12B,4096,H100-SXM,8,1,1,1,8,1,64,none,bf16,100,,
"""
JOB = """
apiVersion: regrow.dev/v1alpha1
kind: TrainingJob
metadata: {name: large}
spec:
  entrypoint: {script: train.py}
  nodes: {min: 1, max: 4}
  batch: {global: 64}
  model: {layers: 32, hidden: 4096, heads: 32, kvHeads: 8, ffnHidden: 14336, vocab: 128256, seqLength: 8192}
  checkpoint: {uri: checkpoints}
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text(ROWS)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence of a command that must end with exit code 2."""
    assert main(["plan", *arguments]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("regrow: ")
    assert errors.count("\n") == 1, errors
    return errors


def test_every_row_is_answered_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--evaluate", "rows.csv", "--json"]) == 0
    output, errors = capsys.readouterr()
    answer = json.loads(output)
    assert list(answer) == ["rows"]
    ran, crashed, unknown = answer["rows"]
    names = ["row_id", "measured_step_s", "predicted_step_s", "measured_memory_bytes", "predicted_memory_bytes", "fits"]
    assert all(list(row) == names for row in answer["rows"])
    assert ran["measured_step_s"] == pytest.approx(16 * 8192 / 8 / 6667)
    assert ran["measured_memory_bytes"] == 77 * 2**30
    assert ran["fits"] is True
    assert (crashed["measured_step_s"], crashed["measured_memory_bytes"], crashed["fits"]) == (None, None, False)
    assert unknown == {"row_id": "c"} | dict.fromkeys(names[1:])
    assert "rows.csv, line 4: the model 'Flux-12B' is not known" in errors


def test_tables_are_shown_with_what_they_are_off(capsys: pytest.CaptureFixture[str]) -> None:
    Path("other.csv").write_text("system,num_gpus,gbs,model,size,dtype\nh100,8.0,32,llama3,8b,fp8\n")
    assert main(["plan", "--evaluate", "rows.csv", "--evaluate", "other.csv"]) == 0
    shown = capsys.readouterr().out
    assert "step time: off by" in shown
    assert "of 1 rows" in shown
    assert "out of memory: 1 of 1 rows foreseen" in shown
    assert "other.csv" in shown


def test_what_is_learnt_is_kept_and_used(capsys: pytest.CaptureFixture[str]) -> None:
    def predicted(*more: str) -> float:
        assert main(["plan", "--evaluate", "rows.csv", "--json", *more]) == 0
        return float(json.loads(capsys.readouterr().out)["rows"][0]["predicted_step_s"])

    measured = 16 * 8192 / 8 / 6667
    plain = predicted("--calibrate", "learnt.json")
    once = json.loads(Path("learnt.json").read_text())
    better = predicted("--calibration", "learnt.json")
    assert abs(better - measured) < abs(plain - measured) / 2
    predicted("--calibrate", "learnt.json")
    assert json.loads(Path("learnt.json").read_text())["factors"][0][3] == 2 * once["factors"][0][3]
    assert [path.name for path in Path().iterdir() if "learnt" in path.name] == ["learnt.json"]
    Path("job.yaml").write_text(JOB)
    Path("train.py").touch()

    def step(*more: str) -> float:
        assert main(["plan", "job.yaml", "--nodes", "1x8:h100", "--json", *more]) == 0
        return float(json.loads(capsys.readouterr().out)["rounds"][0]["chosen"]["step_s"])

    assert step() != step("--calibration", "learnt.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no row"),
        ("gpu,n_gpus\n", "holds no row"),
        ('gpu\n"a', "is not CSV"),
        ("model,gpu,n_gpus,gbs\nLlama-3-8B,h100,eight,8\n", "rows.csv, line 2: n_gpus is 'eight'"),
        ("model,gpu,n_gpus,gbs\nLlama-3-8B,h100,8,\n", "rows.csv, line 2: the column gbs is missing or empty"),
        ("model,gpu,n_gpus,gbs,tp\nLlama-3-8B,h100,8,8,0\n", "rows.csv, line 2: tp is '0'"),
        ("model,gpu,n_gpus,gbs,zero_stage\nLlama-3-8B,h100,8,8,5\n", "zero_stage is '5'"),
        ("model,gpu,n_gpus,gbs\nLlama-3-8B,tpu,8,8\n", "the gpu 'tpu' is not known"),
        ("model,gpu,n_gpus,gbs,tp\nLlama-3-8B,h100,8,8,3\n", "n_gpus 8 is no multiple of tp 3"),
        ("model,gpu,n_gpus,gbs,mem_gib\nLlama-3-8B,h100,8,8,nan\n", "mem_gib is 'nan'"),
    ],
)
def test_a_wrong_table_is_named_with_line_and_column(text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.csv").write_text(text)
    assert words in refused(capsys, "--evaluate", "rows.csv")
    assert not Path("learnt.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--evaluate", "none.csv"], "none.csv cannot be read"),
        (["--evaluate", "binary.csv"], "is not text in UTF-8"),
        (["job.yaml", "--evaluate", "rows.csv"], "--evaluate takes no job file"),
        (["--calibrate", "learnt.json"], "--calibrate is for --evaluate"),
        ([], "the job file is missing"),
        (["--evaluate", "rows.csv", "--calibration", "rows.csv"], "rows.csv is no calibration of regrow"),
        (["--evaluate", "rows.csv", "--calibration", "wrong.json"], "not a calibration of regrow"),
        (["--evaluate", "rows.csv", "--calibrate", "wrong.json"], "not a calibration of regrow"),
        (["--evaluate", "rows.csv", "--calibrate", "no/such/learnt.json"], "cannot be written"),
    ],
)
def test_wrong_arguments(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("wrong.json").write_text('{"calibration": 1, "factors": [["h100", 1, 1, "x", 0]]}')
    Path("binary.csv").write_bytes(b"\xff\xfe\x00")
    assert words in refused(capsys, *arguments)
