"""A power cut, on a real file system: what was not synced is gone, and what was sealed is there.

An ext4 image is shut down in the middle of saves by the ioctl that drops its journal and all dirty pages, then mounted
again. Needs root, loop devices and mkfs.ext4.
"""

import errno
import fcntl
import json
import os
import random
import shutil
import struct
import subprocess
import threading
import time

import pytest

from jsft.errors import CheckpointError
from jsft.run.checkpoint import Policy, Saver, newest_whole
from jsft.run.directory import RunDirectory
from jsft.run.metrics import MetricsWriter
from tests.run.test_checkpoint import abstract, assert_equal, make_state, newest
from tests.run.test_directory import make_config

CUTS = int(os.environ.get("JSFT_POWER_CUTS", 10))
SHUTDOWN, WITHOUT_THE_JOURNAL = 0x8004587D, 2  # EXT4_IOC_SHUTDOWN, EXT4_GOING_FLAGS_NOLOGFLUSH

pytestmark = pytest.mark.slow


class Disk:
    """An ext4 file system in a file, whose power can be cut."""

    def __init__(self, folder):
        self.image, self.place = folder / "disk.img", folder / "disk"
        self.place.mkdir()

    def make(self):
        with self.image.open("wb") as file:
            file.truncate(96 * 2**20)
        subprocess.run(["mkfs.ext4", "-q", "-F", self.image], check=True)
        self.mount()

    def mount(self):
        done = subprocess.run(["mount", "-o", "loop", self.image, self.place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no image can be mounted here: {done.stderr.strip()}")

    def cut(self):
        descriptor = os.open(self.place, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", WITHOUT_THE_JOURNAL))
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP):
                pytest.skip("this kernel's ext4 cannot be shut down")
            raise
        finally:
            os.close(descriptor)

    def unmount(self):
        for _ in range(50):
            if subprocess.run(["umount", self.place], capture_output=True).returncode == 0:
                return
            time.sleep(0.1)
        raise AssertionError("the image is still in use")


@pytest.fixture
def disk(tmp_path):
    if os.geteuid() != 0 or not shutil.which("mkfs.ext4"):
        pytest.skip("needs root and mkfs.ext4")
    disk = Disk(tmp_path)
    disk.make()
    yield disk
    subprocess.run(["umount", "-l", disk.place], capture_output=True)


class Training(threading.Thread):
    """Saves step after step, as a run does, until the disk is gone."""

    def __init__(self, workdir, first):
        super().__init__()
        self.step = self.sealed = first
        self.said = []
        self.directory = RunDirectory(workdir)
        self.directory.enter(make_config(), "run")
        self.writer = MetricsWriter(workdir, first, self.said.append)
        self.saver = Saver(workdir, Policy(keep=1), {}, self.said.append, self.writer.sync)

    def run(self):
        while not self.saver.failed:
            self.step += 1
            self.writer.write(self.step, {"loss": 1.0})
            self.directory.status("running", self.step)
            self.saver.save(self.step, make_state(self.step, devices=1))
            self.saver.wait()
            if not self.saver.failed:
                self.sealed = self.step
        self.writer.close()
        self.directory.release()


def test_a_power_cut_costs_the_steps_since_the_last_save_and_no_more(disk):
    moments, sealed, lost = random.Random(0), 0, []
    workdir = disk.place / "run"
    for cut in range(CUTS):
        training = Training(workdir, sealed)
        training.start()
        while training.sealed == sealed and training.is_alive():
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 1))
        before = training.sealed  # what the run believed to be safe
        disk.cut()
        training.join()
        disk.unmount()
        disk.mount()
        said = []
        try:
            json.loads((workdir / "config.json").read_text())
            json.loads((workdir / "status.json").read_text())
            state = newest(workdir, abstract(make_state(devices=1)), said.append)
            found = newest_whole(workdir, said.append)
            assert found is not None and before <= found <= training.step, f"{found} after {before}"
            assert_equal(state, make_state(found, devices=1))
            MetricsWriter(workdir, found, said.append).close()  # as the resumed run does
            steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
            assert steps == list(range(1, found + 1)), "the numbers of the steps that are not run again"
        except (AssertionError, CheckpointError, OSError, ValueError) as error:
            lost.append(f"cut {cut}, step {before} was sealed: {type(error).__name__} {error}; said: {said}")
            found = before
        sealed = found
    assert not lost, f"{len(lost)} of {CUTS}: " + "\n".join(lost)
    print(f"{CUTS} power cuts, {sealed} steps saved, 0 lost")
