"""The text that the embedded model and the intermediate task are made of shares no eight words in a row with Subj or
subj-mini: looked up among committed hashes of their sequences, so that it needs neither Subj nor what left them out."""

import hashlib
import lzma
import os
from pathlib import Path

import numpy as np
import pytest

from spikegpt_lora.pretrain.corpus import KEPT_APART, word_sequences
from spikegpt_lora.tasks.registry import load_task

DATA = os.environ.get("SPIKEGPT_LORA_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="needs film/ and subj/: set SPIKEGPT_LORA_DATA to their folder")
HASHES = Path(__file__).parents[1] / "files" / "sequences-of-subj.npy"  # uint8 (N, 6): of sha256, sorted


def hashes(texts):
    found = set().union(*map(word_sequences, texts))
    return {hashlib.sha256(sequence.encode()).digest()[:6] for sequence in found}


@pytest.fixture(scope="module")
def committed():
    return {row.tobytes() for row in np.load(HASHES)}


def of_task(name):
    return [text for rows in load_task(name).values() for text in rows["text"]]


def test_they_hold_subj_mini(committed):
    assert hashes(of_task("subj-mini")) <= committed


@needs_data
def test_they_are_those_of_all_tasks(committed):
    assert set().union(*(hashes(of_task(name)) for name in KEPT_APART)) == committed


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("file", ["sentences.tsv.xz", "plots.txt.xz"])
def test_the_film_text_shares_none_with_them(committed, file):
    lines = lzma.decompress((Path(DATA) / "film" / file).read_bytes()).decode().splitlines()
    texts = [line.rpartition("\t")[2] for line in lines]
    assert len(texts) > 30_000 and not hashes(texts) & committed
