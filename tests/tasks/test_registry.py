"""Tests of tasks/registry.py: the same splits from every source, ASCII text, damage named, nothing found soon said."""

import hashlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from spikegpt_lora.tasks import registry
from spikegpt_lora.tasks import subj as source
from spikegpt_lora.tasks.registry import load_task
from spikegpt_lora.tasks.splits import resplit
from spikegpt_lora.tasks.text import to_ascii

SHARED = os.environ.get("SPIKEGPT_LORA_DATA")
real_data = pytest.mark.skipif(not SHARED, reason="needs the Subj files: set SPIKEGPT_LORA_DATA to their folder")
PLOT, QUOTE = "plot.tok.gt9.5000", "quote.tok.gt9.5000"

# Runs tasks/registry.py alone (without the package, without torch) on "subj"; says how it ended and how long that took.
SCRIPT = """
import importlib, json, os, socket, sys, time, types
package = sys.modules["spikegpt_lora"] = types.ModuleType("spikegpt_lora")
package.__path__ = [os.path.dirname(os.path.dirname(sys.argv[1]))]
data = importlib.import_module("spikegpt_lora.tasks.registry")
heavy = sorted({"datasets", "huggingface_hub", "sklearn", "torch"} & set(sys.modules))
if sys.argv[2] == "dns-hangs":
    socket.getaddrinfo = lambda *args, **kwargs: time.sleep(60)
start = time.perf_counter()
try:
    rows = {name: len(split) for name, split in data.load_task("subj").items()}
    error = message = None
except Exception as problem:
    rows, error, message = None, type(problem).__name__, str(problem)
seconds = time.perf_counter() - start
print(json.dumps(dict(rows=rows, error=error, message=message, seconds=seconds, heavy=heavy)))
"""


def sentences(label: int) -> list[str]:
    if label == 0:
        return [f"the café owner no {i} – alone in naples – leaves josé behind ." for i in range(5000)]
    return [f"naïve … number {i} isn’t a film but a cliché ." for i in range(5000)]


def write_folder(folder: Path, plot: list[bytes] | None = None, quote: list[bytes] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, label, lines in ((PLOT, 0, plot), (QUOTE, 1, quote)):
        lines = [text.encode("cp1252") for text in sentences(label)] if lines is None else lines
        (folder / name).write_bytes(b"".join(line + b"\n" for line in lines))
    return folder


def hub_lines(change=lambda text: text) -> list[str]:
    """Interleaved classes, as JSON lines like those of SetFit/subj."""
    pairs = [(text, label) for both in zip(sentences(0), sentences(1), strict=True) for label, text in enumerate(both)]
    return [json.dumps({"text": change(t), "label": l, "label_text": source.LABELS[l]}) for t, l in pairs]


def write_hub_files(folder: Path, lines: list[str]) -> Path:
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(line + "\n" for line in lines[:8000]), encoding="utf-8")
    (folder / "test.jsonl").write_text("".join(line + "\n" for line in lines[8000:]), encoding="utf-8")
    return folder


def use_hub_cache(monkeypatch, cache: Path, lines: list[str]) -> None:
    """Offline, with `lines` as the hub's data set in the local cache."""
    from huggingface_hub import constants

    write_hub_files(cache / "datasets--SetFit--subj" / "snapshots" / source.HUB_REVISION, lines)
    monkeypatch.delenv("SPIKEGPT_LORA_DATA", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def run_alone(tmp_path: Path, endpoint: str, case: str = "", **env: str) -> dict:
    env = {"PATH": os.environ["PATH"], "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "NO_PROXY": "*"} | env
    command = [sys.executable, "-c", SCRIPT, registry.__file__, case]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *chatter, result = done.stdout.splitlines()
    return json.loads(result) | {"console": chatter + done.stderr.splitlines()}


def rows(splits) -> dict[str, list[tuple[int, str]]]:
    return {name: list(zip(split["label"], split["text"], strict=True)) for name, split in splits.items()}


def numbers(splits) -> dict[str, list[tuple[int, str]]]:
    """(label, number in the text) in order: which sentences are where, whatever became of the other characters."""
    return {name: [(l, re.search(r"\d+", t)[0]) for l, t in pairs] for name, pairs in rows(splits).items()}


def cat_v(text: str) -> str:
    codes = text.encode("cp1252")
    return "".join(chr(c) if c < 128 else f"M-{chr(c - 128)}" if c >= 160 else f"M-^{chr(c - 64)}" for c in codes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("root") / "subj")


@pytest.fixture(scope="module")
def from_folder(folder):
    return load_task("subj", folder)


@pytest.fixture
def silent_server():
    """A loopback address that accepts connections and never answers, with its socket."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}", server


def test_columns_and_label_names(from_folder):
    for split in from_folder.values():
        assert split.column_names == ["text", "label"]
        assert split.features["text"].dtype == "string"
        assert split.features["label"].names == ["objective", "subjective"]


def test_splits_follow_the_documented_hash(from_folder):
    expected = {"train": [], "validation": [], "test": []}
    for label in (0, 1):
        for text in sentences(label):
            key = "".join(c for c in text if c.isascii() and c.isalnum()).lower()
            u = int(hashlib.sha256(key.encode()).hexdigest(), 16) / 2**256
            expected["train" if u < 0.7 else "validation" if u < 0.8 else "test"].append((u, label, to_ascii(text)))
    assert rows(from_folder) == {name: [pair[1:] for pair in sorted(part)] for name, part in expected.items()}


def test_repeated_sentence_of_one_class_stays_in_one_split(tmp_path):
    plot = [text.encode("cp1252") for text in sentences(0)]
    plot[1] = plot[0].replace(b" .", b" !")
    splits = rows(load_task("subj", write_folder(tmp_path, plot=plot)))
    found = [name for name, pairs in splits.items() for _, text in pairs if text.startswith("the cafe owner no 0 ")]
    assert len(found) == 2 and len(set(found)) == 1


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda text: text, id="utf-8"),
        pytest.param(lambda text: text.encode("utf-8").decode("cp1252"), id="mojibake"),
        pytest.param(lambda text: text.encode("cp1252").decode("latin-1"), id="latin-1"),
        pytest.param(lambda text: text.encode("cp1252").decode("utf-8", "ignore"), id="undecodable-dropped"),
        pytest.param(cat_v, id="cat-v"),
        pytest.param(lambda text: re.sub(r"(n’t|[–….])", r" \1 ", text), id="tokenised-again"),
    ],
)
def test_hub_copy_gives_the_folders_split_and_order(change, from_folder, tmp_path, monkeypatch):
    use_hub_cache(monkeypatch, tmp_path, hub_lines(change))
    assert numbers(load_task("subj")) == numbers(from_folder)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda text: text, id="utf-8"),
        pytest.param(lambda text: text.encode("utf-8").decode("cp1252"), id="mojibake"),
        pytest.param(lambda text: text.encode("cp1252").decode("latin-1"), id="latin-1"),
        pytest.param(cat_v, id="cat-v"),
    ],
)
def test_encodings_of_one_text_give_one_text(change, from_folder, tmp_path, monkeypatch):
    use_hub_cache(monkeypatch, tmp_path, hub_lines(change))
    assert rows(load_task("subj")) == rows(from_folder)


def test_folder_saved_as_utf8_gives_the_same_rows(from_folder, tmp_path):
    files = [[text.encode("utf-8") for text in sentences(label)] for label in (0, 1)]
    assert rows(load_task("subj", write_folder(tmp_path, *files))) == rows(from_folder)


def test_line_order_and_windows_line_ends_do_not_matter(from_folder, tmp_path):
    files = [[text.encode("cp1252") + b"\r" for text in reversed(sentences(label))] for label in (0, 1)]
    assert rows(load_task("subj", write_folder(tmp_path, *files))) == rows(from_folder)


def test_data_root_and_task_folder_are_both_accepted(folder, from_folder):
    assert rows(load_task("subj", str(folder.parent))) == rows(from_folder)


def test_environment_variable_names_the_folder(folder, from_folder, monkeypatch):
    monkeypatch.setenv("SPIKEGPT_LORA_DATA", str(folder.parent))
    assert rows(load_task("subj")) == rows(from_folder)


def test_argument_comes_before_environment_variable(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SPIKEGPT_LORA_DATA", str(tmp_path / "absent"))
    assert len(load_task("subj", folder)) == 3


@pytest.mark.parametrize("origin", ["data_dir", "SPIKEGPT_LORA_DATA"])
def test_given_folder_without_the_files_never_falls_through(origin, tmp_path, monkeypatch):
    use_hub_cache(monkeypatch, tmp_path / "cache", hub_lines())  # the hub would have them
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    if origin == "SPIKEGPT_LORA_DATA":
        monkeypatch.setenv(origin, str(wrong))
    with pytest.raises(ValueError, match=f"{origin} must hold {PLOT} and {QUOTE}, found no .* in {wrong}"):
        load_task("subj", wrong if origin == "data_dir" else None)


def test_unknown_task_is_told_the_names():
    with pytest.raises(
        ValueError, match="must be subj, subj-mini, cola, rte, a file or folder .*/name; 'subjj' is none of these"
    ):
        load_task("subjj")


def test_built_in_task_refuses_a_folder(folder):
    with pytest.raises(ValueError, match="data_dir must be None for the built-in task subj-mini"):
        load_task("subj-mini", folder)


def test_import_loads_no_heavy_package(tmp_path):
    assert run_alone(tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")["heavy"] == []


@pytest.mark.parametrize("case", ["refused", "silent", "dns-hangs", "HF_HUB_OFFLINE"])
def test_nothing_found_is_one_quiet_error_within_five_seconds(case, tmp_path, silent_server):
    endpoint = {"refused": "http://127.0.0.1:9", "dns-hangs": "http://hub.invalid"}.get(case, silent_server[0])
    result = run_alone(tmp_path, endpoint, case, **({case: "1"} if case.startswith("HF") else {}))
    assert result["error"] == "FileNotFoundError"
    assert result["seconds"] < 5
    assert result["console"] == []
    for way in ("--data-dir", "rotten_imdb.tar.gz", PLOT, QUOTE, "SPIKEGPT_LORA_DATA", "hub", "subj-mini"):
        assert way in result["message"]


def test_offline_setting_opens_no_connection(tmp_path, silent_server):
    endpoint, server = silent_server
    run_alone(tmp_path, endpoint, HF_HUB_OFFLINE="1")
    server.settimeout(0.2)
    with pytest.raises(TimeoutError):
        server.accept()


class HubHandler(BaseHTTPRequestHandler):
    """As much of the hub as a download of two files needs."""

    def __init__(self, folder: Path, *args):
        self.folder = folder
        super().__init__(*args)

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        prefix, _, name = self.path.rpartition("/")
        known = prefix == f"/datasets/SetFit/subj/resolve/{source.HUB_REVISION}" and name in source.HUB_FILES
        content = (self.folder / name).read_bytes() if known else b""
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", source.HUB_REVISION)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def test_hub_download_serves_offline_afterwards(tmp_path, from_folder):
    files = write_hub_files(tmp_path / "hub", hub_lines())
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(HubHandler, files))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        online = run_alone(tmp_path, f"http://127.0.0.1:{server.server_port}", HF_HUB_DISABLE_XET="1")
    finally:
        server.shutdown()
        server.server_close()
    offline = run_alone(tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    expected = {name: len(split) for name, split in from_folder.items()}
    assert (online["rows"], offline["rows"]) == (expected, expected)


@pytest.mark.parametrize(
    "name, number, line, found",
    [
        pytest.param(PLOT, 7, b"", "letters or digits.*found ''", id="empty-line"),
        pytest.param(PLOT, 5000, b" . . . ", "letters or digits.*found ' . . . '", id="no-letters"),
        pytest.param(QUOTE, 8, b"bad \x81 byte", "cp1252 text, found byte 0x81 at column 5", id="undecodable"),
        pytest.param(QUOTE, 9, b"The caf owner no 3 alone in naples leaves jos behind", "in one class", id="both"),
    ],
)
def test_damaged_line_is_named(name, number, line, found, tmp_path):
    folder = write_folder(tmp_path)
    lines = (folder / name).read_bytes().split(b"\n")
    lines[number - 1] = line
    (folder / name).write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=f"{re.escape(name)} line {number} must .*{found}"):
        load_task("subj", folder)


def test_sentence_in_both_classes_names_the_other_place(tmp_path):
    quote = [text.encode("cp1252") for text in sentences(1)[:-1]] + [sentences(0)[41].encode("cp1252")]
    with pytest.raises(ValueError, match=f"{QUOTE} line 5000 must be in one class, .*{PLOT} line 42"):
        load_task("subj", write_folder(tmp_path, quote=quote))


def test_only_the_newline_byte_ends_a_line(tmp_path):
    quote = [b"one \x85 two %d \x0b \x0c \r three" % i for i in range(5000)]
    splits = load_task("subj", write_folder(tmp_path, quote=quote))
    assert sum(splits.num_rows.values()) == 10_000


def test_empty_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{PLOT} must hold one sentence a line, found an empty file"):
        load_task("subj", write_folder(tmp_path, plot=[]))


def test_missing_file_is_named(tmp_path):
    (write_folder(tmp_path) / QUOTE).unlink()
    with pytest.raises(ValueError, match=f"found no {QUOTE} in"):
        load_task("subj", tmp_path)


def test_blank_line_at_the_end_is_named(tmp_path):
    plot = [text.encode("cp1252") for text in sentences(0)] + [b""]
    with pytest.raises(ValueError, match=f"{PLOT} line 5001 must hold a sentence"):
        load_task("subj", write_folder(tmp_path, plot=plot))


@pytest.mark.parametrize("count", [4999, 5001])
def test_wrong_number_of_sentences_is_named(count, tmp_path):
    plot = [b"sentence %d" % i for i in range(count)]
    with pytest.raises(ValueError, match=f"5000 objective sentences, found {count} in .*{PLOT}"):
        load_task("subj", write_folder(tmp_path, plot=plot))


@pytest.mark.parametrize(
    "line, found",
    [
        ('{"text": "a", "label": 2, "label_text": "neutral"}', "found 2 'neutral'"),
        ('{"text": "a", "label": -1}', "found -1 None"),
        ('{"text": "a", "label": "1"}', "found '1' None"),
        ('{"text": "a", "label": 0, "label_text": "subjective"}', "found 0 'subjective'"),
        ('{"label": 0, "label_text": "objective"}', "must be a JSON object with text and label"),
        ('{"text": null, "label": 0}', "must be a JSON object with text and label"),
        ("[]", "must be a JSON object with text and label"),
        ('{"text": "a", "la', "must be a JSON object with text and label"),
    ],
)
def test_damaged_hub_line_is_named(line, found, tmp_path, monkeypatch):
    lines = hub_lines()
    lines[8001] = line
    use_hub_cache(monkeypatch, tmp_path, lines)
    with pytest.raises(ValueError, match=f"test.jsonl line 2 must .*{found}|test.jsonl line 2 {found}"):
        load_task("subj")


@pytest.mark.parametrize("line", ["neutral\ta fine sentence", "objective a sentence without a tab", ""])
def test_damaged_line_of_the_built_in_sample_is_named(line, tmp_path, monkeypatch):
    lines = source.MINI_FILE.read_text(encoding="utf-8").split("\n")
    lines[11] = line
    monkeypatch.setattr(source, "MINI_FILE", tmp_path / "subj-mini.tsv")
    source.MINI_FILE.write_text("\n".join(lines), encoding="utf-8")
    found = re.escape(f"found {line!r}")
    with pytest.raises(ValueError, match=f"subj-mini.tsv line 12 must be objective or subjective.*{found}"):
        load_task("subj-mini")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Amélie’s “naïve”   coup d‘œil", "amelie's \"naive\" coup d'oeil"),
        ("here… — not – that", "here . . . -- not -- that"),
        ("cafÃ© â€“ olÃ©", "cafe -- ole"),
        ("here\x85 not \x96 that", "here . . . not -- that"),
        ("prot&#233 ; g&#233 ; r&#38 ; r", "prote ge r& r"),
        ("alfonso cuar&oacute ; n", "alfonso cuaro n"),
        ("it&#180 ; s &#133 ; late", "it' s . . . late"),
        ("fianc & # 233 ; , & # 38 ; more", "fianc e , & more"),
        ("broadway^&#197 ; well ^ & # 214 ; only", "broadway . . . well -- only"),
        ("r&d &thing ; a & b ;", "r&d &thing ; a & b ;"),
        ("½ ﬁlm ≥ 漢字 ¿ que\u00ad sera", "1/2 film que sera"),
    ],
)
def test_text_becomes_plain_ascii(text, expected):
    assert to_ascii(text) == expected


def test_built_in_sample_has_300_sentences_a_class():
    splits = load_task("subj-mini")
    assert Counter(label for split in splits.values() for label in split["label"]) == {0: 300, 1: 300}


def test_built_in_sample_is_plain_ascii():
    assert source.MINI_FILE.read_bytes().isascii()


@pytest.fixture(scope="module")
def subj():
    return load_task("subj", SHARED)


@real_data
def test_real_subj_has_5000_sentences_a_class(subj):
    assert Counter(label for split in subj.values() for label in split["label"]) == {0: 5000, 1: 5000}


@real_data
def test_real_split_sizes_are_near_70_10_20(subj):
    share = {name: len(split) / 10_000 for name, split in subj.items()}
    assert share == pytest.approx({"train": 0.7, "validation": 0.1, "test": 0.2}, abs=0.015)


@real_data
def test_real_text_is_printable_lower_case_ascii(subj):
    assert [t for split in subj.values() for t in split["text"] if not re.fullmatch("[ -@\\[-~]+", t)] == []


@real_data
def test_real_text_holds_no_entities(subj):
    assert [t for split in subj.values() for t in split["text"] if re.search(r"& ?(# ?\d+|[a-z]+) ;", t)] == []


@real_data
def test_real_subj_is_the_released_text(caplog):
    load_task("subj", SHARED)
    assert caplog.records == []


def test_other_text_than_the_released_one_is_logged(folder, caplog):
    load_task("subj", folder)
    assert [(r.name, r.levelno) for r in caplog.records] == [("spikegpt_lora.tasks.registry", logging.WARNING)]


@real_data
def test_built_in_sample_shares_no_eight_words_with_real_subj(subj):
    def sequences(splits) -> set[tuple[str, ...]]:
        texts = [re.findall(r"[a-z0-9'-]+", text) for split in splits.values() for text in split["text"]]
        return {tuple(words[i : i + 8]) for words in texts for i in range(len(words) - 7)}

    assert sequences(load_task("subj-mini")) & sequences(subj) == set()


def test_the_authors_split_is_90_to_10_stratified_and_the_seeds_own():
    data = load_task("subj-mini")
    a, again, b = resplit(data, 0), resplit(data, 0), resplit(data, 1)
    assert (len(a["train"]), len(a["test"]), sum(a["test"]["label"])) == (540, 60, 30)
    assert a["test"]["text"] == again["test"]["text"] != b["test"]["text"]
    assert set(a["train"]["text"]) | set(a["test"]["text"]) == {t for split in data.values() for t in split["text"]}
