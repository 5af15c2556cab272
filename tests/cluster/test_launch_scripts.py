"""scripts/launch_node.sh and scripts/cluster/: which processes they start with which ranks, and the exit code.

No cluster: the programs that they call only say how they were called.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ConfigDict

from jsft.cluster.processes import Cluster, find_cluster

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def clean() -> dict[str, str]:
    """This environment without what names a rank."""
    names = ("SLURM", "SKYPILOT", "NODE_", "MASTER_", "PROC_PER_", "LOCAL_RANK")
    return {name: value for name, value in os.environ.items() if not name.startswith(names)}


def launch(tmp_path: Path, python: str, count: int = 2) -> subprocess.Popen:
    """launch_node.sh with `count` processes of a Python that is the given bash text."""
    program(tmp_path / "bin" / "python", python)
    environment = clean() | {"JSFT_VENV": str(tmp_path), "PROC_PER_NODE": str(count)}
    command = [str(SCRIPTS / "launch_node.sh"), "--workdir", str(tmp_path)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        ("exit 0", "exit 0", 0),
        ("exit 9", "sleep 0.4; exit 3", 3),  # 3 is the reason, 9 its consequence
        ("exit 3", "sleep 0.4; exit 9", 3),
        ("kill -9 $$", "sleep 0.4; exit 9", 137),
        ("sleep 0.4; exit 9", "exit 9", 9),
    ],
)
def test_exit_code_of_a_node_is_that_of_the_process_that_failed_by_itself(tmp_path, first, second, code):
    process = launch(tmp_path, f"if [[ $LOCAL_RANK == 0 ]]; then {first}; else {second}; fi")
    assert process.wait(20) == code


def test_a_node_without_failures_waits_for_all_and_passes_a_signal_on_to_each(tmp_path):
    waits = f"trap 'touch {tmp_path}/told-$LOCAL_RANK; exit 0' TERM; touch {tmp_path}/up-$LOCAL_RANK; "
    process = launch(tmp_path, waits + "for ((;;)); do sleep 0.05; done")
    while len(list(tmp_path.glob("up-*"))) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0 and len(list(tmp_path.glob("told-*"))) == 2


@pytest.mark.slow
def test_a_stuck_process_is_killed_and_its_death_is_not_the_reason(tmp_path):
    began = time.monotonic()
    process = launch(tmp_path, "if [[ $LOCAL_RANK == 0 ]]; then exit 9; fi; kill -STOP $$")
    assert process.wait(60) == 9 and 25 < time.monotonic() - began < 45


# Prints what find_cluster reads, then the arguments, a line each time it is called.
SAY = 'echo "$NODE_COUNT $NODE_RANK $MASTER_ADDR ${MASTER_PORT:-29400} $PROC_PER_NODE|$*"'


def clusters(output: str, local: int = 0) -> list[tuple[Cluster, str]]:
    """The cluster that each called launcher finds, as the process `local` of its node, and its arguments."""
    names = ("NODE_COUNT", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "PROC_PER_NODE")
    found = []
    for line in output.splitlines():
        values, _, arguments = line.partition("|")
        environment = dict(zip(names, values.split(), strict=True)) | {"LOCAL_RANK": str(local)}
        found.append((find_cluster(environment), arguments))
    return found


def test_slurm_starts_a_launcher_on_each_node_with_its_rank(tmp_path):
    program(tmp_path / "scripts" / "run_forever.sh", SAY)
    program(tmp_path / "bin" / "scontrol", '[[ "$*" == "show hostnames gpu[03-04]" ]] && printf "gpu03\\ngpu04\\n"')
    program(
        tmp_path / "bin" / "srun",
        "while [[ $1 == --* ]]; do shift; done\n"
        'for ((i = 0; i < SLURM_NNODES; i++)); do SLURM_NODEID=$i "$@" || exit; done',
    )
    environment = clean() | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "gpu[03-04]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "12345",
        "PROC_PER_NODE": "8",
    }
    command = ["bash", str(SCRIPTS / "cluster" / "slurm.sh"), "--workdir", "a run", "--config.mesh.replica=2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    first, second = clusters(done.stdout, local=3)
    assert [first[0][:4], second[0][:4]] == [(16, 3, "gpu03", 30090), (16, 11, "gpu03", 30090)]
    assert first[1] == second[1] == "scripts/launch_node.sh --workdir a run --config.mesh.replica=2"


def test_slurm_without_a_job_says_how_to_start(tmp_path):
    done = subprocess.run(
        ["bash", str(SCRIPTS / "cluster" / "slurm.sh")], env=clean(), capture_output=True, text=True, timeout=30
    )
    assert done.returncode and "start this script with sbatch" in done.stderr


@pytest.mark.parametrize("script", ["launch_node.sh", "run_forever.sh", "eval_vllm.sh", "cluster/slurm.sh"])
def test_a_script_parses(script):
    done = subprocess.run(["bash", "-n", str(SCRIPTS / script)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Resources(Strict):
    """The fields of SkyPilot's documentation that the file uses: a misspelled one is refused there and here."""

    accelerators: str
    disk_size: int
    network_tier: str


class Task(Strict):
    name: str
    workdir: str
    num_nodes: int
    resources: Resources
    volumes: dict[str, str]
    envs: dict[str, str]
    setup: str
    run: str


def test_skypilot_starts_a_launcher_on_each_node_with_its_rank(tmp_path):
    task = Task.model_validate(yaml.safe_load((SCRIPTS / "cluster" / "skypilot.yaml").read_text()))
    assert task.resources.accelerators == "H200:8" and task.resources.network_tier in ("standard", "best")
    assert (ROOT / task.setup).is_file() and set(task.volumes) == {"/shared"}
    assert (ROOT / task.envs["CONFIG"].partition(":")[0]).is_file()
    program(tmp_path / "scripts" / "run_forever.sh", SAY)
    output = ""
    for rank in range(2):
        node = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5"}
        environment = clean() | task.envs | node | {"OPTIONS": "--ignore_plan --config.name=x"}
        done = subprocess.run(
            ["bash", "-c", task.run], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, done.stderr
        output += done.stdout
    first, second = clusters(output)
    assert [first[0][:4], second[0][:4]] == [(2, 0, "10.0.0.4", 29400), (2, 1, "10.0.0.4", 29400)]
    assert first[1] == (
        f"scripts/launch_node.sh --config {task.envs['CONFIG']} --workdir /shared/runs/{task.envs['RUN']} "
        "--config.mesh.replica=2 --ignore_plan --config.name=x"
    )
