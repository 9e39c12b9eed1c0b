from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator import jobfile
from orchestrator.core.errors import InvalidInput
from orchestrator.core.spec import AutoInterval, AxisBounds, Budget, FailureClass, JobSpec, ModelSpec

FULL = """
apiVersion: regrow.dev/v1alpha1
kind: TrainingJob
metadata: {name: gpt}
spec:
  entrypoint: {script: train.py, args: ["--lr", "3e-4", --steps, 100]}
  nodes: {min: 1, max: 4, devices: auto}
  model: {layers: 8, hidden: 256, heads: 8, kvHeads: 4, ffnHidden: 688, vocab: 256, seqLength: 128}
  batch: {global: 48, micro: auto}
  parallelism: {tp: {max: 4, prefer: 2}, pp: {max: 2}, cp: 1, dp_shard: {min: 2}, dpReplicate: 1}
  checkpoint: {uri: "file:///ckpt/gpt", format: native, interval: auto, keep: {last: 3}, replicas: 1}
  recovery:
    heartbeat: 1s
    lostAfter: 10s
    hangAfter: auto
    startWithin: 2m
    settle: 500ms
    waitForReplacement: auto
    budgets: {user: {failures: 1}, hardware: {failures: 7, window: 30m}}
  hardware: {device: auto, peers: auto}
  seed: 7
  environment: {OMP_NUM_THREADS: 2, NAME: gpt}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text("")
    return tmp_path


def changed(path: str, value: Any) -> dict[str, Any]:
    """The full job with `value` at the dotted `path`; deletes the key where the value is `...`."""
    job: dict[str, Any] = deepcopy(yaml.safe_load(FULL))
    *parents, key = path.split(".")
    inner = job
    for parent in parents:
        inner = inner[parent]
    if value is ...:
        del inner[key]
    else:
        inner[key] = value
    return job


def parse(job: dict[str, Any], base: Path) -> JobSpec:
    return jobfile.parse(json.dumps(job), base)


def refusal(text: str, base: Path) -> str:
    with pytest.raises(InvalidInput) as caught:
        jobfile.parse(text, base)
    message = str(caught.value)
    assert message.startswith("job description: ")
    assert "\n" not in message
    assert len(message) < 1000
    return message.removeprefix("job description: ")


def test_the_example_of_the_design(folder: Path) -> None:
    spec = jobfile.parse(FULL, folder)
    assert spec.name == "gpt"
    assert spec.entrypoint.script == str(folder / "train.py")
    assert spec.entrypoint.working_directory == str(folder)
    assert spec.entrypoint.args == ("--lr", "3e-4", "--steps", "100")
    assert (spec.min_nodes, spec.max_nodes, spec.devices_per_node) == (1, 4, None)
    assert spec.model == ModelSpec(8, 256, 8, 4, 688, 256, 128)
    assert (spec.global_batch, spec.micro_batch) == (48, None)
    assert spec.parallelism == {
        "tp": AxisBounds(1, 4, 2),
        "pp": AxisBounds(1, 2),
        "cp": AxisBounds(1, 1),
        "dp_shard": AxisBounds(2),
        "dp_replicate": AxisBounds(1, 1),
    }
    assert (spec.checkpoint.uri, spec.checkpoint.every_s, spec.checkpoint.every_steps) == (
        "file:///ckpt/gpt",
        None,
        None,
    )
    assert spec.checkpoint.auto == AutoInterval()
    assert spec.recovery.settle_s == 0.5
    assert spec.recovery.start_within_s == 120.0
    assert spec.recovery.hang_after_s is None
    assert spec.recovery.wait_for_replacement_s is None
    assert spec.recovery.budgets[FailureClass.USER] == Budget(1, 3600.0)
    assert spec.recovery.budgets[FailureClass.HARDWARE] == Budget(7, 1800.0)
    assert spec.recovery.budgets[FailureClass.UNKNOWN] == Budget(10, 3600.0)
    assert (spec.device_kind, spec.rack_oversubscription) == (None, 1.0)
    assert spec.seed == 7
    assert dict(spec.environment) == {"OMP_NUM_THREADS": "2", "NAME": "gpt"}


def test_the_shortest_job(folder: Path) -> None:
    text = """
    {apiVersion: regrow.dev/v1alpha1, kind: TrainingJob, metadata: {name: a},
     spec: {entrypoint: {script: train.py}, batch: {global: 8}, checkpoint: {uri: ckpt}}}
    """
    spec = jobfile.parse(text, folder)
    assert (spec.min_nodes, spec.max_nodes) == (1, 1)
    assert spec.model is None
    assert spec.parallelism == {}
    assert spec.checkpoint.uri == str(folder / "ckpt")
    assert (spec.checkpoint.every_s, spec.checkpoint.auto) == (None, AutoInterval())


def test_json_and_yaml_say_the_same(folder: Path) -> None:
    assert jobfile.parse(json.dumps(yaml.safe_load(FULL), indent="\t"), folder) == jobfile.parse(FULL, folder)


@pytest.mark.parametrize(
    ("interval", "every_s", "every_steps"),
    [("20 steps", None, 20), ("1 step", None, 1), ("5s", 5.0, None), ("1.5m", 90.0, None)],
)
def test_intervals(folder: Path, interval: str, every_s: float | None, every_steps: int | None) -> None:
    checkpoint = parse(changed("spec.checkpoint.interval", interval), folder).checkpoint
    assert (checkpoint.every_s, checkpoint.every_steps, checkpoint.auto) == (every_s, every_steps, None)


@pytest.mark.parametrize(
    ("interval", "least_s", "most_s"),
    [
        ("auto", 10.0, 3600.0),
        ({"min": "30s", "max": "10m"}, 30.0, 600.0),
        ({"max": "5s"}, 5.0, 5.0),
        ({"min": "2h"}, 7200.0, 7200.0),
        ({}, 10.0, 3600.0),
    ],
)
def test_intervals_left_open(folder: Path, interval: Any, least_s: float, most_s: float) -> None:
    spec = parse(changed("spec.checkpoint.interval", interval), folder)
    checkpoint = spec.checkpoint
    assert (checkpoint.every_s, checkpoint.every_steps) == (None, None)
    assert checkpoint.auto == AutoInterval(least_s, most_s)
    assert jobfile.parse(jobfile.dump(spec), folder) == spec


@pytest.mark.parametrize("interval", [{"min": "1h", "max": "1m"}, {"least": "1s"}, {"min": 3}, {"max": "0s"}])
def test_bounds_of_intervals_that_make_no_sense(folder: Path, interval: Any) -> None:
    with pytest.raises(InvalidInput, match=r"spec\.checkpoint\.interval"):
        parse(changed("spec.checkpoint.interval", interval), folder)


def test_fixed_values_where_auto_could_stand(folder: Path) -> None:
    assert parse(changed("spec.nodes.devices", 2), folder).devices_per_node == 2
    assert parse(changed("spec.batch.micro", 4), folder).micro_batch == 4
    assert parse(changed("spec.recovery.hangAfter", "45s"), folder).recovery.hang_after_s == 45.0
    assert parse(changed("spec.recovery.waitForReplacement", "1m"), folder).recovery.wait_for_replacement_s == 60.0
    assert parse(changed("spec.recovery.settle", "0s"), folder).recovery.settle_s == 0.0
    assert parse(changed("spec.hardware.device", "h100"), folder).device_kind == "h100"
    assert parse(changed("spec.hardware.rackOversubscription", 4), folder).rack_oversubscription == 4.0
    assert parse(changed("spec.nodes", {"min": 3}), folder).max_nodes == 3
    assert parse(changed("spec.parallelism", {"tp": 2}), folder).parallelism == {"tp": AxisBounds(2, 2)}


def test_a_working_directory_of_its_own(folder: Path) -> None:
    (folder / "run").mkdir()
    found = parse(changed("spec.entrypoint.workingDirectory", "run"), folder).entrypoint
    assert found.working_directory == str(folder / "run")
    assert found.script == str(folder / "train.py")


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        # unknown keys name the nearest valid one
        ("spec.batch.globl", 48, "unknown key spec.batch.globl: did you mean spec.batch.global?"),
        (
            "spec.recovery.lost_after",
            "3s",
            "unknown key spec.recovery.lost_after: did you mean spec.recovery.lost",
        ),
        ("spec.parallelism.tpp", 2, "unknown key spec.parallelism.tpp: did you mean spec.parallelism.tp?"),
        ("spec.parallelism.tp", {"maximum": 2}, "unknown key spec.parallelism.tp.maximum: did you mean spec.parall"),
        ("spec.hardware.rackOversubscripton", 4, "did you mean spec.hardware.rackOversubscription?"),
        ("spec.recovery.budgets.hardwear", {}, "did you mean spec.recovery.budgets.hardware?"),
        ("spec.seqLength", 128, "unknown key spec.seqLength: did you mean spec.model.seqLength?"),
        ("spec.nodes.zzz", 1, "unknown key spec.nodes.zzz: valid here: min, max, devices"),
        ("sepc", {}, "unknown key sepc: did you mean spec?"),
        ("metadata.namespace", "x", "unknown key metadata.namespace: did you mean metadata.name?"),
        # missing ones
        ("spec.batch", ..., "spec.batch is missing; add it"),
        ("spec.entrypoint.script", ..., "spec.entrypoint.script is missing; add it"),
        ("metadata.name", ..., "metadata.name is missing; add it"),
        # wrong kind of value
        ("spec", [1], "spec must be a mapping, not a list"),
        ("spec.entrypoint.args", "--lr", "spec.entrypoint.args must be a list, not '--lr'"),
        ("spec.entrypoint.args", [["x"]], "spec.entrypoint.args.0 must be text or a number"),
        (
            "spec.entrypoint.args",
            [True],
            "args.0 must be text or a number (put quotes around it), not true",
        ),
        ("spec.batch.global", "48", "spec.batch.global must be a whole number, not '48'"),
        ("spec.batch.global", True, "spec.batch.global must be a whole number, not true"),
        ("spec.batch.global", 4.5, "spec.batch.global must be a whole number, not 4.5"),
        ("spec.batch.global", None, "spec.batch.global must be a whole number, not empty"),
        ("spec.model.tiedEmbeddings", "yes", "spec.model.tiedEmbeddings must be true or false, not 'yes'"),
        ("metadata.name", 12, "metadata.name must be text, not 12"),
        ("spec.parallelism.tp", [2], "spec.parallelism.tp must be a size such as 2, or bounds"),
        ("spec.environment", {"A": ["x"]}, "spec.environment.A must be text or a number"),
        # values out of range
        ("spec.batch.global", 0, "spec.batch.global must be at least 1, not 0"),
        ("spec.batch.global", 10**12, "spec.batch.global must be at most 1000000000"),
        ("spec.batch.micro", 49, "spec.batch.micro (49) is more than spec.batch.global (48)"),
        ("spec.nodes.min", 5, "spec.nodes.max (4) is less than spec.nodes.min (5)"),
        ("spec.nodes.max", 0, "spec.nodes.max must be at least 1, not 0"),
        ("spec.nodes.devices", "all", "spec.nodes.devices must be a whole number, not 'all'"),
        ("spec.parallelism.tp", {"min": 4, "max": 2}, "spec.parallelism.tp.max (2) is less than its min (4)"),
        ("spec.parallelism.tp", {"max": 2, "prefer": 4}, "spec.parallelism.tp.prefer (4) lies outside 1 to 2"),
        ("spec.parallelism.dp_shard", 49, "gives no sample to some of the 49 data-parallel replicas"),
        ("spec.checkpoint.keep.last", 0, "spec.checkpoint.keep.last must be at least 1, not 0"),
        ("spec.seed", -1, "spec.seed must be at least 0, not -1"),
        ("spec.seed", 2**63, f"spec.seed must be at most {2**63 - 1}"),
        ("spec.model.kvHeads", 3, "spec.model.heads (8) is not a multiple of kvHeads (3)"),
        ("spec.model.heads", 7, "spec.model.hidden (256) is not a multiple of heads (7)"),
        (
            "spec.model",
            {"layers": 2},
            "spec.model lacks hidden, heads, ffnHidden, vocab, seqLength; add them",
        ),
        # durations
        ("spec.recovery.lostAfter", 10, "spec.recovery.lostAfter must be a duration with its unit such as 500ms"),
        ("spec.recovery.lostAfter", "10 parsecs", "must be a duration with its unit"),
        ("spec.recovery.heartbeat", "0s", "spec.recovery.heartbeat must be a duration above zero, not '0s'"),
        ("spec.recovery.heartbeat", "-1s", "spec.recovery.heartbeat must be a duration"),
        ("spec.recovery.heartbeat", "10s", "spec.recovery.lostAfter (10s) must exceed heartbeat (10s)"),
        ("spec.checkpoint.interval", 20, "spec.checkpoint.interval must be auto, bounds such as {min: 30s, max: 10m}"),
        ("spec.checkpoint.interval", "0 steps", "spec.checkpoint.interval must be auto"),
        ("spec.checkpoint.interval", "0s", "spec.checkpoint.interval must be auto"),
        # names and places
        ("metadata.name", "Gpt", "metadata.name must be lower-case letters, digits and '-' inside (a DNS-1123 label)"),
        ("metadata.name", "-gpt", "metadata.name must be lower-case letters"),
        ("metadata.name", "gpt\n", "metadata.name must be lower-case letters"),
        ("metadata.name", "", "metadata.name must be lower-case letters"),
        ("metadata.name", "g" * 64, "metadata.name must have at most 63 characters"),
        ("spec.entrypoint.script", "nope.py", "nope.py does not exist; give the path of the training script"),
        ("spec.entrypoint.script", ".", "is a folder, not a file"),
        ("spec.entrypoint.workingDirectory", "nope", "nope is not a folder"),
        (
            "spec.checkpoint.uri",
            "s3://bucket/x",
            "has the scheme 's3', which is not supported; use file:///",
        ),
        ("spec.checkpoint.uri", "file://ckpt/gpt", "names no folder; write file:///folder"),
        ("spec.checkpoint.uri", "file:///", "names no folder"),
        ("spec.checkpoint.uri", "train.py", "train.py is not a folder"),
        ("spec.checkpoint.uri", "", "spec.checkpoint.uri must be a path of printable characters, not ''"),
        ("spec.checkpoint.uri", "file://[x", "is no URI"),
        ("spec.checkpoint.uri", "a\0b", "spec.checkpoint.uri must be a path of printable characters, not 'a\\x00b'"),
        ("spec.checkpoint.uri", "x" * 300, "File name too long; correct the path"),
        ("spec.entrypoint.script", "x" * 300, "File name too long; correct the path"),
        ("spec.entrypoint.script", "a\nb", "spec.entrypoint.script must be a path of printable characters"),
        ("spec.entrypoint.args", ["\ud800"], "no NUL, no lone surrogates"),
        ("spec.environment", {"1A": "x"}, "spec.environment.1A is not a variable name"),
        ("spec.environment", {"REGROW_X": "x"}, "spec.environment.REGROW_X is set by regrow itself"),
        # what this version does not do
        ("spec.checkpoint.format", "dcp", "spec.checkpoint.format must be 'native', not 'dcp' (other formats are not"),
        ("spec.checkpoint.replicas", 2, "spec.checkpoint.replicas must be 1, not 2 (copies on other nodes are not"),
        ("spec.hardware.rackOversubscription", 0.5, "spec.hardware.rackOversubscription must be at least 1.0, not 0.5"),
        ("spec.hardware.rackOversubscription", 2000, "spec.hardware.rackOversubscription must be at most 1000"),
        ("spec.hardware.rackOversubscription", "4:1", "spec.hardware.rackOversubscription must be a number, not '4:1'"),
        ("spec.hardware.rackOversubscription", float("nan"), "rackOversubscription must be a number, not nan"),
        ("spec.hardware.peers", ["a"], "spec.hardware.peers must be 'auto', not a list"),
        ("apiVersion", "v1", "apiVersion must be 'regrow.dev/v1alpha1', not 'v1'"),
        ("kind", "Job", "kind must be 'TrainingJob', not 'Job'"),
    ],
)
def test_one_clear_sentence(folder: Path, path: str, value: Any, expected: str) -> None:
    assert expected in refusal(json.dumps(changed(path, value)), folder)


def test_all_problems_are_told_at_once_unknown_keys_first(folder: Path) -> None:
    job = changed("spec.batch.global", 0)
    job["spec"]["nodes"]["mim"] = 1
    assert refusal(json.dumps(job), folder) == (
        "unknown key spec.nodes.mim: did you mean spec.nodes.min?; spec.batch.global must be at least 1, not 0"
    )


def test_many_problems_are_cut(folder: Path) -> None:
    job = changed("spec.nodes", {f"key{index}": 1 for index in range(500)})
    assert refusal(json.dumps(job), folder).endswith("; and 495 more")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "must be a mapping with apiVersion, kind, metadata and spec, but is empty"),
        ("- a\n- b", "but is a list"),
        ("just words", "but is a str"),
        ("a: [1", "not valid YAML (line 1, column 6: "),
        ("a: 1\n\tb: 2", "not valid YAML (line 2, column 1: "),
        ("a: \x01", "not valid YAML ("),
        ("---\na: 1\n---\nb: 2", "not valid YAML ("),
        ("a: !!python/object:os.system x", "not valid YAML ("),
        ("a: 2024-13-45", "holds a value that cannot be read"),
        ("a: &x 1\nb: *x", "YAML aliases (*name) are not supported (line 2)"),
        ("a: {<<: *x}", "YAML aliases (*name) are not supported"),
        ("a: 1\na: 2", "key 'a' stands twice (again in line 2); keep one"),
        ('{"a": 1, "a": 2}', "key 'a' stands twice; keep one"),
        ("? [1, 2]\n: x", "line 1 has a key that is not text"),
        ("- " * 5000, "nested too deeply"),
        ('{"a":' * 100000, "nested too deeply"),
        ("a: " + "1" * 5000, "holds a value that cannot be read"),
        ("x" * 1_000_001, "larger than 1 MB"),
        ("\ud800: 1", "not valid YAML ("),
    ],
)
def test_text_that_is_no_job_file(folder: Path, text: str, expected: str) -> None:
    assert expected in refusal(text, folder)


def test_an_alias_bomb_is_refused_at_once(folder: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    assert "aliases" in refusal("\n".join(lines), folder)


def test_load_names_the_file_and_takes_paths_from_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "job.yaml"
    path.write_text(FULL)
    assert jobfile.load(path).entrypoint.script == str(folder / "train.py")
    monkeypatch.chdir(folder)
    assert jobfile.load(Path("job.yaml")) == jobfile.load(path)
    path.write_text(FULL.replace("global: 48", "global: 0"))
    with pytest.raises(InvalidInput, match=r"job\.yaml: spec\.batch\.global must be at least 1, not 0"):
        jobfile.load(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot read job file .*: No such file or directory; check the path"),
        (b"a: \xff\xfe", r"job\.yaml: not UTF-8 text \(byte 3\)"),
        (b"#" * 2_000_000, "larger than 1 MB"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes | None, expected: str) -> None:
    path = tmp_path / "job.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidInput, match=expected):
        jobfile.load(path)


def test_a_folder_is_no_job_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot read job file"):
        jobfile.load(tmp_path)


def test_an_endless_file_is_not_read_to_its_end() -> None:
    with pytest.raises(InvalidInput, match="larger than 1 MB"):
        jobfile.load(Path("/dev/zero"))


LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
GPT2 = {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}


def with_config(folder: Path, config: Any, **more: Any) -> JobSpec:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return parse(changed("spec.model", {"configJson": "config.json", **more}), folder)


def test_sizes_from_a_hugging_face_config(folder: Path) -> None:
    llama = ModelSpec(32, 4096, 32, 8, 14336, 128256, 131072)
    assert with_config(folder, LLAMA).model == llama
    assert with_config(folder, LLAMA, seqLength=8192).model == ModelSpec(32, 4096, 32, 8, 14336, 128256, 8192)
    assert with_config(folder, {**LLAMA, "head_dim": 64}).model == replace(llama, head_size=64)
    mixtral = {**LLAMA, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    assert with_config(folder, mixtral).model == replace(llama, experts=8, experts_per_token=2, expert_hidden=14336)
    qwen = {**mixtral, "model_type": "qwen3_moe", "num_experts": 128, "moe_intermediate_size": 768}
    assert with_config(folder, qwen).model == replace(llama, experts=128, experts_per_token=2, expert_hidden=768)
    assert with_config(folder, GPT2).model == ModelSpec(12, 768, 12, 12, 3072, 50257, 1024, True, False)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("{", "not JSON"),
        ("[]", "not a Hugging Face config.json"),
        ({"model_type": "t5"}, "model_type 't5' is not one of llama, mistral, qwen2, qwen3, mixtral, qwen3_moe, gpt2"),
        ({**LLAMA, "model_type": "mixtral"}, "num_local_experts is missing"),
        ({**LLAMA, "model_type": "qwen3_moe", "decoder_sparse_step": 2}, "some layers have no experts"),
        ({**LLAMA, "hidden_size": None}, "hidden_size is missing"),
        ({**LLAMA, "vocab_size": "many"}, "vocab_size must be a whole number of at least 1, not many"),
        ({**LLAMA, "head_dim": 0}, "head_dim must be a whole number of at least 1, not 0"),
        ({**LLAMA, "num_attention_heads": 7, "num_key_value_heads": 7}, "is not a multiple of heads (7)"),
    ],
)
def test_configs_that_cannot_be_used(folder: Path, config: Any, expected: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        with_config(folder, config)
    assert expected in str(caught.value)


def test_a_config_that_is_not_there_or_said_twice(folder: Path) -> None:
    assert "cannot read" in refusal(json.dumps(changed("spec.model", {"configJson": "no.json"})), folder)
    twice = changed("spec.model", {"configJson": "no.json", "kvHeads": 4})
    assert "spec.model.kvHeads and spec.model.configJson say the same thing twice" in refusal(json.dumps(twice), folder)


def test_dump_is_the_inverse_of_parse_from_any_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for job in (
        yaml.safe_load(FULL),
        changed("spec.model", ...),
        changed("spec.checkpoint", {"uri": "ckpt/a b", "interval": "20 steps"}),
        changed("spec.recovery", {"heartbeat": "333ms", "lostAfter": "1.000001s", "hangAfter": "3d"}),
        changed("spec.model", yaml.safe_load(FULL)["spec"]["model"] | {"tiedEmbeddings": True, "gatedFfn": False}),
        changed("spec.hardware.rackOversubscription", 1.3),
        changed("spec.environment", {"A": "yes", "B": "1: {x", "C": "", "D": "ü\n"}),
    ):
        spec = parse(job, folder)
        assert jobfile.parse(jobfile.dump(spec), elsewhere) == spec


def test_the_schema_knows_every_key_of_the_design() -> None:
    found = jobfile.schema()
    assert set(found["properties"]) == {"apiVersion", "kind", "metadata", "spec"}
    assert found["$defs"]["JobKeys"]["additionalProperties"] is False
    assert set(found["$defs"]["JobKeys"]["properties"]) == set(yaml.safe_load(FULL)["spec"])


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def paths(job: dict[str, Any], above: str = "") -> list[str]:
    found = []
    for key, value in job.items():
        found.append(above + key)
        if isinstance(value, dict):
            found.extend(paths(value, f"{above}{key}."))
    return found


PATHS = paths(yaml.safe_load(FULL))


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(PATHS), VALUES)
def test_any_value_anywhere_is_taken_or_refused_in_one_sentence(folder: Path, path: str, value: Any) -> None:
    try:
        spec = jobfile.parse(json.dumps(changed(path, value)), folder)
    except InvalidInput as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1500
    else:
        assert isinstance(spec, JobSpec)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60))
def test_any_text_is_refused_in_one_sentence(folder: Path, text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        jobfile.parse(text, folder)
    assert "\n" not in str(caught.value)
