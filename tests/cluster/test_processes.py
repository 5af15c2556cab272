"""Where a process finds its rank: flags, the launcher's variables, SLURM."""

import pytest

from jsft.cluster.processes import DEFAULT_PORT, Cluster, find_cluster, first_host
from jsft.errors import ConfigError

NODES = {"NODE_COUNT": "4", "NODE_RANK": "2", "MASTER_ADDR": "node0"}
SLURM = {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "12345",
}


def test_alone():
    assert find_cluster({}) is None
    assert find_cluster({"NODE_COUNT": "1", "NODE_RANK": "0"}) is None
    assert find_cluster({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
    assert find_cluster({}, "localhost:1", 1, 0) is None


def test_one_process_a_node():
    cluster = find_cluster(NODES)
    assert cluster == Cluster(4, 2, "node0", DEFAULT_PORT, None, "NODE_COUNT and NODE_RANK")
    assert find_cluster(NODES | {"MASTER_PORT": "5000"}).port == 5000


def test_one_process_a_gpu():
    environment = NODES | {"PROC_PER_NODE": "8", "LOCAL_RANK": "3"}
    cluster = find_cluster(environment)
    assert (cluster.count, cluster.index, cluster.local_devices) == (32, 19, (3,))
    assert find_cluster(environment | {"JAX_PLATFORMS": "cpu"}).local_devices is None
    assert find_cluster(environment | {"CUDA_VISIBLE_DEVICES": "3"}).local_devices is None, "it sees no other"
    assert find_cluster(environment | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}).local_devices == (3,)


def test_slurm():
    cluster = find_cluster(SLURM)
    assert (cluster.count, cluster.index, cluster.host, cluster.local_devices) == (8, 5, "gpu03", (1,))
    assert 1024 < cluster.port < 65535 and cluster.port == find_cluster(SLURM | {"SLURM_PROCID": "0"}).port
    one_a_node = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x8)", "SLURM_LOCALID": "0"}
    assert find_cluster(one_a_node).local_devices is None
    assert find_cluster(SLURM | {"MASTER_ADDR": "head", "MASTER_PORT": "99"})[2:4] == ("head", 99)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a1,b2", "a1"), ("gpu[03-05,9],login", "gpu03"), ("gpu[7,9]", "gpu7"), ("n[5]", "n5")],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


def test_flags_win():
    assert find_cluster(NODES, "10.0.0.1:7000", 2, 1) == Cluster(2, 1, "10.0.0.1", 7000, None, "flags")
    assert find_cluster({}, "host", 2, 0).port == DEFAULT_PORT


@pytest.mark.parametrize(
    ("environment", "flags", "message"),
    [
        ({}, ("h:1", None, None), "go together"),
        ({}, ("h:1", 2, 2), "process 2 of 2"),
        ({}, ("h:x", 2, 1), "is not a number"),
        ({"NODE_COUNT": "2"}, (), "MASTER_ADDR is not"),
        (NODES | {"NODE_RANK": "4"}, (), "out of range"),
        (NODES | {"NODE_COUNT": "two"}, (), "NODE_COUNT='two' is not a number"),
        (NODES | {"PROC_PER_NODE": "8"}, (), "scripts/launch_node.sh"),
        ({k: v for k, v in SLURM.items() if k != "SLURM_PROCID"}, (), "SLURM's environment is incomplete"),
    ],
)
def test_refused(environment, flags, message):
    with pytest.raises(ConfigError, match=message):
        find_cluster(environment, *flags)
