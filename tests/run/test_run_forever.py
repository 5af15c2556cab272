"""scripts/run_forever.sh: which exits it restarts, and when it gives up. A script replaces the training."""

import os
import signal
import subprocess
import time

import pytest

from tests.run.processes import ROOT


@pytest.fixture
def forever(tmp_path):
    """Starts the script over a 'training' that ends with these codes in turn, saving where `+` says so."""
    training = tmp_path / "training.sh"
    training.write_text(
        "#!/usr/bin/env bash\n"
        f'cd "{tmp_path}"\n'
        'read -r code < codes; sed -i 1d codes; echo "$code" >> seen\n'
        'if [[ $code == *+ ]]; then n=$(wc -l < seen); mkdir -p "run/checkpoints/$n"; '
        'touch "run/checkpoints/$n/manifest.json"; fi\n'
        "code=${code%+}\n"
        "if [[ $code == sleep ]]; then trap 'exit 0' TERM; sleep 30 & wait; exit 1; fi\n"
        "if [[ $code == kill ]]; then kill -9 $$; fi\n"
        'exit "$code"\n'
    )
    training.chmod(0o755)

    def start(codes, **environment):
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        return subprocess.Popen(
            [ROOT / "scripts" / "run_forever.sh", training, "--workdir", tmp_path / "run"],
            env=os.environ | {"JSFT_BACKOFF": "0"} | environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    start.seen = lambda: (tmp_path / "seen").read_text().split()
    return start


def test_restarts_what_a_restart_mends(forever):
    process = forever(["8", "9", "kill", "134", "0"])
    assert process.wait(20) == 0
    assert forever.seen() == ["8", "9", "kill", "134", "0"]
    assert process.stderr.read().count("restart ") == 4


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 6, 7])
def test_leaves_the_rest_to_a_person(forever, code):
    process = forever([str(code), "0"])
    assert process.wait(20) == code and forever.seen() == [str(code)]
    assert f"a restart cannot fix exit code {code}" in process.stderr.read()


def test_gives_up_without_progress(forever):
    process = forever(["9"] * 9, JSFT_RESTARTS="3")
    assert process.wait(20) == 9 and forever.seen() == ["9"] * 4
    assert "3 restarts without a new checkpoint after step 0; giving up" in process.stderr.read()


def test_a_new_checkpoint_resets_the_count(forever):
    process = forever(["9", "9", "9+", "9", "0"], JSFT_RESTARTS="2")
    assert process.wait(20) == 0 and len(forever.seen()) == 5


def test_backs_off(forever):
    began = time.monotonic()
    assert forever(["9", "9", "0"], JSFT_BACKOFF="1").wait(30) == 0
    assert 3 <= time.monotonic() - began < 15  # 1 + 2 seconds


def test_passes_a_signal_on_and_does_not_restart(forever):
    process = forever(["sleep", "0"])
    while not process.poll() and not (seen := _try(forever.seen)):
        time.sleep(0.05)
    assert seen == ["sleep"]
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0 and forever.seen() == ["sleep"]


def test_says_how_it_is_used():
    process = subprocess.run([ROOT / "scripts" / "run_forever.sh"], capture_output=True, text=True)
    assert process.returncode == 2 and "JSFT_RESTARTS" in process.stdout


def _try(read):
    try:
        return read()
    except FileNotFoundError:
        return []
