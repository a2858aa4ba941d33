"""The files of deploy/, held against schemas and linters, and their commands against the flags."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import log_rows

import standalone_transformer_lm as lm

yaml = pytest.importorskip("yaml")

REPO = Path(__file__).parents[1]
DEPLOY = REPO / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
SCRIPTS = [*MANIFESTS, DEPLOY / "slurm.sh", DEPLOY / "skypilot.yaml"]


def tool(name):
    """A program that pip installed beside this Python."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        pytest.skip(f"{name} is not installed")
    return str(path)


def documents(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def strings(value):
    """Every text in a document."""
    if isinstance(value, str):
        yield value
        return
    parts = value.values() if isinstance(value, dict) else value
    for part in parts if isinstance(value, dict | list) else ():
        yield from strings(part)


def shells(path):
    """The shell scripts in a file: itself, or texts of it that call the program."""
    if path.suffix == ".sh":
        return [path.read_text()]
    found = [text for document in documents(path) for text in strings(document)]
    return [text for text in found if re.search(r"\b(python|torchrun|pip)\b", text)]


def commands(path):
    """The words behind the program's name, of each call."""
    for script in shells(path):
        script = re.sub(r"#.*", "", script).replace("\\\n", " ")
        for call in re.findall(rf"{lm.PROGRAM} ([^\n;|']*(?:'[^'\n]*'[^\n;|']*)*)", script):
            yield [re.sub(r"\$\{?\w+\}?", "4", word) for word in shlex.split(call)]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_kubernetes_accepts_each_manifest(path):
    validate = pytest.importorskip("kubernetes_validate")
    for document in documents(path):
        if document["kind"] == "TrainJob":
            models = pytest.importorskip("kubeflow_trainer_api.models")
            job = models.TrainerV1alpha1TrainJob.from_dict(document)
            assert job.to_dict() == document  # no field is unknown
        else:
            version = validate.latest_version()
            validate.validate(document, version, strict=True)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_jobs_end_gently_and_go_on(path):
    for document in documents(path):
        if document["kind"] != "Job":
            continue
        spec = document["spec"]
        pod = spec["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        trains = "torchrun" in container["args"][0]
        assert not trains or pod["terminationGracePeriodSeconds"] >= 60
        assert not trains or "exec torchrun" in container["args"][0]  # signals reach it
        if trains:
            ignored = [
                rule for rule in spec["podFailurePolicy"]["rules"] if rule["action"] == "Ignore"
            ]
            assert ignored[0]["onPodConditions"][0]["type"] == "DisruptionTarget"


def test_names_agree_across_the_manifests():
    found = [document for path in MANIFESTS for document in documents(path)]
    names = {
        kind: {d["metadata"]["name"] for d in found if d["kind"] == kind}
        for kind in ("PersistentVolumeClaim", "Secret", "Service", "Job")
    }
    text = "\n".join(path.read_text() for path in MANIFESTS)
    assert set(re.findall(r"claimName: ([\w-]+)", text)) == names["PersistentVolumeClaim"]
    assert set(re.findall(r"secretRef: \{name: ([\w-]+)", text)) == names["Secret"]
    for document in found:
        if document["kind"] == "Service":
            name = document["metadata"]["name"]
            assert document["spec"]["selector"]["job-name"] == name in names["Job"]
    jobs = {d["metadata"]["name"]: d for d in found if d["kind"] == "Job"}
    for name in names["Service"]:
        spec = jobs[name]["spec"]
        (container,) = spec["template"]["spec"]["containers"]
        assert spec["template"]["spec"]["subdomain"] == name
        assert f"{name}-0.{name}:29500" in container["args"][0]
        assert f"--nnodes={spec['completions']} " in container["args"][0]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_in_each_file_passes_shellcheck(path):
    for script in shells(path):
        if not script.startswith("#!"):
            script = "#!/bin/bash\n" + script
        result = subprocess.run(
            [tool("shellcheck"), "-"], input=script, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout


def test_the_dockerfile_passes_hadolint_and_copies_what_there_is():
    path = DEPLOY / "Dockerfile"
    result = subprocess.run([tool("hadolint"), str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    for line in re.findall(r"^COPY (.*) \./$", path.read_text(), re.MULTILINE):
        assert all((REPO / name).exists() for name in line.split())


def test_every_command_in_the_folder_parses():
    seen = []
    for path in SCRIPTS:
        for words in commands(path):
            command, *flags = words
            assert lm.read_command(lm.COMMANDS[command].run, flags)
            seen.append(command)
    assert sorted(set(seen)) == ["grpo", "prep", "train"]
    assert len(seen) >= 10


def test_skypilot_task_has_known_fields():
    (task,) = documents(DEPLOY / "skypilot.yaml")
    assert set(task) <= {
        "name",
        "resources",
        "workdir",
        "envs",
        "secrets",
        "setup",
        "run",
        "file_mounts",
        "num_nodes",
        "config",
    }
    assert set(task["resources"]) <= {
        "accelerators",
        "use_spot",
        "disk_size",
        "job_recovery",
        "infra",
        "cpus",
        "memory",
    }
    assert task["resources"]["use_spot"] and task["resources"]["job_recovery"]["strategy"]


SRUN = """#!/usr/bin/env bash
# A stand-in: two tasks; signals go to all of them, as Slurm sends them.
while [[ "$1" == --* ]]; do shift; done
pids=()
for i in 0 1; do
  SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
  pids+=($!)
done
trap 'kill -USR1 "${pids[@]}"' USR1
echo $$ > srun.pid
code=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; one=$?; done
  ((one > code)) && code=$one
done
exit "$code"
"""

SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >> scontrol.log; fi
"""


@pytest.mark.slow
def test_the_slurm_script_saves_requeues_and_goes_on(tmp_path, data_dir):
    flags = (
        "--n_layer 1 --d_model 32 --n_head 2 --seq_len 32 --batch_size 2 --device cpu "
        "--max_steps 100000 --log_interval 1 --eval_interval 100000 --compile 0"
    )
    script = (DEPLOY / "slurm.sh").read_text()
    script = script.replace("data/corpus", str(data_dir))
    script = script.replace("--preset 700m --tokens 14e9 --zero 1", flags)
    (tmp_path / "job.sh").write_text(script)
    (tmp_path / lm.PROGRAM).symlink_to(REPO / lm.PROGRAM)
    tools = tmp_path / "venv" / "bin"
    tools.mkdir(parents=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tools / "activate").write_text(f"export PATH={tools}:{Path(sys.executable).parent}:$PATH\n")
    env = {
        **os.environ,
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_NNODES": "1",
    }

    metrics = tmp_path / "runs" / "train" / "metrics.jsonl"
    reached = 0
    for turn in range(2):
        with open(tmp_path / f"{turn}.log", "w") as log:
            job = subprocess.Popen(
                ["bash", "job.sh"], cwd=tmp_path, env=env, stdout=log, stderr=log
            )
        end = time.monotonic() + 120
        while job.poll() is None and time.monotonic() < end:
            if metrics.exists() and len(log_rows(metrics.parent)) > reached + 3:
                break
            time.sleep(0.2)
        os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGUSR1)
        assert job.wait(120) == 0, (tmp_path / f"{turn}.log").read_text()
        steps = [row["step"] for row in log_rows(metrics.parent)]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) > reached
        reached = len(steps)
    asked = (tmp_path / "scontrol.log").read_text().split("\n")
    assert asked[:2] == [f"requeue {os.getpid()}"] * 2
