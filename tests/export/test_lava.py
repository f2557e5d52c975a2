"""recipes/replay_in_lava.py, where a Python 3.10 with Lava is named: SPIKEGPT_LORA_LAVA=lava/bin/python."""

import os
import re
import subprocess

import h5py
import pytest
import running
from builders import DESIGNS, batch_of, small, spiking

from spikegpt_lora.export import export_bundle

LAVA = "SPIKEGPT_LORA_LAVA"
pytestmark = pytest.mark.skipif(LAVA not in os.environ, reason=f"{LAVA} names no Python that has Lava")


def replayed(bundle):
    command = [os.environ[LAVA], str(running.RECIPES / "replay_in_lava.py"), str(bundle)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_spikes_are_those_of_loihis_arithmetic_and_an_altered_one_is_not(tmp_path):
    bundle = export_bundle(small(), batch_of(), tmp_path / "bundle", weights="int8")
    done = replayed(bundle)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"LIF: (\d+) wrong, \d+ rounded of ([\d,]+) .* it got (\d+) wrong", done.stdout)
    wrong, steps, on_purpose = (int(number.replace(",", "")) for number in found.groups())
    assert wrong == 0 and steps > 1000 and on_purpose > 10
    with h5py.File(bundle / "traces.h5", "r+") as file:
        spikes = file["nodes/blocks.0.lif1/observables/spikes/data"]
        spikes[0, 3, 0] = not spikes[0, 3, 0]
    done = replayed(bundle)
    assert done.returncode == 1 and "blocks.0.lif1: 1 wrong" in done.stdout


def test_what_is_no_bundle_is_said(tmp_path):
    done = replayed(tmp_path)
    assert done.returncode == 2 and "cannot be read" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("design", DESIGNS)
def test_sums_of_matrices_that_read_integer_spikes_are_exact(design, tmp_path):
    bundle = export_bundle(spiking(design), batch_of(), tmp_path / "bundle", weights="int8")
    done = replayed(bundle)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"Dense: (\d+) wrong of ([\d,]+) sums in (\d+) matrices", done.stdout)
    wrong, sums, matrices = (int(number.replace(",", "")) for number in found.groups())
    assert wrong == 0 and sums > 2000 and matrices == 2 * 7
    assert all(int(n) > 0 for n in re.findall(r"with one weight changed: (\d+) wrong", done.stdout))


def test_matrices_of_float_weights_are_left_out_by_name(tmp_path):
    done = replayed(export_bundle(spiking("M"), batch_of(), tmp_path / "bundle"))
    assert "matrices: left out, weights must be int8" in done.stdout
