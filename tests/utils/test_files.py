"""Files that appear whole or not at all, readable by others, and folders of one writer."""

import errno
import multiprocessing
import os
import re
import threading
from concurrent.futures import ProcessPoolExecutor

import pytest
from safetensors.torch import save_file
from torch import ones

from spikegpt_lora.utils.files import (
    UNFINISHED,
    locked,
    whole_file,
    whole_files,
    write_json,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def mask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_what_is_written_is_readable_by_others_as_the_umask_says(tmp_path, mask):
    write_text(tmp_path / "a.txt", "a")
    with whole_files(tmp_path / "model", last="b.json") as temporary:
        save_file({"w": ones(2)}, temporary / "model.safetensors")
        write_text(temporary / "b.json", "{}")
    files = [tmp_path / "a.txt", *(tmp_path / "model").iterdir()]
    assert [file.stat().st_mode & 0o777 for file in files] == [0o666 & ~mask] * 3


def in_a_folder(path, text):
    with whole_files(path.parent, last=path.name) as temporary:
        (temporary / path.name).write_text(text)


@pytest.mark.parametrize("write", [write_text, write_json, in_a_folder])
def test_a_reader_never_sees_half(tmp_path, write):
    file, texts, stop = tmp_path / "a", [letter * 2**20 for letter in "ab"], threading.Event()
    whole = []
    for text in texts:
        write(file, text)
        whole.append(file.read_text())

    def write_again_and_again():
        while not stop.is_set():
            for text in texts:
                write(file, text)

    writer = threading.Thread(target=write_again_and_again)
    writer.start()
    try:
        seen = {file.read_text() for _ in range(100)}
    finally:
        stop.set()
        writer.join()
    assert seen <= set(whole)


def test_files_of_a_folder_appear_together_and_the_named_one_last(tmp_path, monkeypatch):
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(os.path.basename(b)), replace(a, b)))
    with whole_files(tmp_path / "new", last="a") as temporary:
        for name in "bac":
            (temporary / name).write_text(name)
        assert names(tmp_path / "new") == [temporary.name]
    assert moved == ["b", "c", "a"] and names(tmp_path / "new") == ["a", "b", "c"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_a_folder_as_it_was(tmp_path, error):
    write_text(tmp_path / "a", "before")
    with pytest.raises(error), whole_files(tmp_path, last="a") as temporary:
        (temporary / "a").write_text("half")
        raise error
    with pytest.raises(error), whole_file(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise error
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "before"


def test_a_signal_after_the_move_is_not_hidden_by_what_it_left_to_do(tmp_path, monkeypatch):
    replace = os.replace

    def interrupted(a, b):
        replace(a, b)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "a") as temporary:
        temporary.write_text("whole")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        Exception("No space left on device (os error 28)"),  # tokenizers'
    ],
)
def test_a_full_disk_is_said_with_the_name_of_what_was_written(tmp_path, error):
    for manager in (whole_file(tmp_path / "model.pth"), whole_files(tmp_path / "model.pth-folder", last="a")):
        with pytest.raises(OSError) as raised, manager:
            raise error
        assert raised.value.errno == errno.ENOSPC and "model.pth" in raised.value.filename


def lock(folder):
    with locked(folder):
        pass


def test_another_process_is_refused_and_told_which_one_works_there(tmp_path):
    with locked(tmp_path), ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as other:
        with pytest.raises(ValueError, match=rf"another run \(pid {os.getpid()}\) works in {re.escape(str(tmp_path))}"):
            other.submit(lock, tmp_path).result()
    lock(tmp_path)


def test_the_lock_removes_what_killed_writers_left(tmp_path):
    (tmp_path / "deep" / f"{UNFINISHED}abc").mkdir(parents=True)
    (tmp_path / f"{UNFINISHED}results-x.json").write_text("half")
    (tmp_path / "results.json").write_text("whole")
    with locked(tmp_path):
        assert names(tmp_path / "deep") == []
        assert set(names(tmp_path)) == {"results.json", "deep", ".lock", ".lock-holder"}
