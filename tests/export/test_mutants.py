"""Bundles with bytes changed at random, hashes remade: called right only where nothing that is read has changed."""

import resource
import shutil
import sys
import time

import numpy as np
import pytest
from builders import batch_of, reseal, small

from spikegpt_lora.export import Bundle, export_bundle, simulators
from spikegpt_lora.export.__main__ import main

MUTANTS = 500
SECONDS, BYTES = 10, 2 << 30  # what a check of one may take


def mutate(content, generator):
    """1 to 50 places changed: a bit, a byte, some bytes less or more."""
    content = bytearray(content)
    for _ in range(generator.choice([1, 1, 2, 8, 50])):
        at, kind = int(generator.integers(len(content))), generator.random()
        if kind < 0.6:
            content[at] ^= 1 << int(generator.integers(8))
        elif kind < 0.8:
            content[at] = int(generator.choice([0, 255, 127, *b"09[{-"]))
        elif kind < 0.9:
            del content[at : at + int(generator.integers(1, 40))]
        else:
            content[at:at] = generator.bytes(int(generator.integers(1, 9)))
        content = content or bytearray(b"x")
    return bytes(content)


def all_that_is_read(folder):
    """The contents of a bundle as flat lists of arrays and values."""
    bundle = Bundle(folder)
    traces = [bundle.traces[name][kind] for name in sorted(bundle.traces) for kind in sorted(bundle.traces[name])]
    arrays = [array for part in (bundle.weights, bundle.sentences) for _, array in sorted(part.items())]
    said = {key: value for key, value in bundle.manifest.items() if key != "sha256"}
    return [*traces, *arrays, bundle.events[0]], [bundle.events[1], bundle.nodes, bundle.classes, bundle.cost, said]


@pytest.mark.attack
def test_no_mutant_is_called_right_crashes_hangs_or_takes_much_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(simulators, "installed", dict)
    right, copy = export_bundle(small(), batch_of(), tmp_path / "right", event_driven=True), tmp_path / "copy"
    files = sorted(path.relative_to(right) for path in right.rglob("*") if path.is_file())
    arrays, values = all_that_is_read(right)
    generator, statuses = np.random.default_rng(0), [0, 0, 0]
    monkeypatch.setattr(sys, "argv", ["export", "check", str(copy)])
    main()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(MUTANTS):
        shutil.copytree(right, copy)
        file = copy / files[number % len(files)]
        file.write_bytes(mutate(file.read_bytes(), generator))
        if file.name != "manifest.json.sha256":
            try:
                reseal(copy)
            except (ValueError, TypeError):  # a manifest that can't be read any more
                pass
        capsys.readouterr()
        begin, status, said = time.monotonic(), main(), capsys.readouterr()
        assert status in (0, 1, 2) and "not foreseen" not in said.err + said.out, (number, file, said)
        assert time.monotonic() - begin < SECONDS, (number, file)
        statuses[status] += 1
        if status == 0:
            theirs = all_that_is_read(copy)
            assert all(np.array_equal(one, other) for one, other in zip(arrays, theirs[0], strict=True)), (number, file)
            assert theirs[1] == values, (number, file)
        shutil.rmtree(copy)
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < BYTES
    assert min(statuses) > 0 and statuses[1] > MUTANTS // 3, statuses
