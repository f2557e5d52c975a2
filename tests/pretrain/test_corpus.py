"""Text for pre-training: every source, no evaluation sentence inside, the same order and split wherever it lay."""

import gzip
import lzma

import numpy as np
import pytest
from datasets import Dataset

from spikegpt_lora.pretrain.corpus import batched, prepare_corpora, prepare_corpus, read_documents, word_sequences

SENTENCE = "one two three four five six seven eight nine"


def document(i):
    return f"Review {i}: it's a film, about {i * i} things... and nothing more; {'so ' * (i % 7)}long!"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(document(i) for i in range(800)) + "\n", encoding="utf-8")
    return path


def test_a_file_gives_a_document_a_line_and_no_empty_ones(tmp_path):
    (tmp_path / "a.txt").write_text("first\n\n  second \x85 still second\n", encoding="utf-8")
    assert list(read_documents(tmp_path / "a.txt")) == ["first", "second \x85 still second"]


@pytest.mark.parametrize("suffix, opener", [(".xz", lzma.open), (".gz", gzip.open)])
def test_a_compressed_file_gives_the_same(tmp_path, suffix, opener):
    with opener(tmp_path / f"a.txt{suffix}", "wt", encoding="utf-8") as file:
        file.write("caf\u00e9\nsecond\n")
    assert list(read_documents(tmp_path / f"a.txt{suffix}")) == ["caf\u00e9", "second"]


def test_a_folder_gives_all_its_text_files_in_order(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "b.txt").write_text("second\n")
    (tmp_path / "a.txt").write_text("first\n")
    (tmp_path / "inner" / "c.txt").write_text("third\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert list(read_documents(tmp_path)) == ["first", "second", "third"]


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="'nobody/nothing' is no file or folder, nor a dataset within reach"):
        list(read_documents("nobody/nothing"))
    with pytest.raises(ValueError, match=r"must hold \.txt files"):
        list(read_documents(tmp_path))


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.txt", b"caf\xe9"),
        ("a.txt.xz", lzma.compress(b"text\n" * 99)[:-20]),
        ("a.txt.gz", gzip.compress(b"text\n" * 99)[:10] + bytes(20)),
        ("a.txt.bz2", b"no bzip2"),
    ],
)
def test_damaged_text_is_refused_with_its_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} must be UTF-8 text"):
        list(read_documents(tmp_path / name))


def test_word_sequences_ignore_case_punctuation_and_accents():
    assert word_sequences("One two, THREE four five-six seven \u00e9ight!") == {
        "one two three four five six seven eight"
    }
    assert word_sequences("one two three four five six seven") == set()
    assert len(word_sequences(SENTENCE)) == 2
    assert word_sequences("we ca n't say it 's not one of these") == word_sequences(
        "We can't say it's not one of these"
    )


def test_documents_that_quote_an_evaluation_sentence_are_left_out_and_no_others(tmp_path, text):
    quoting = "So: ONE two, three - four five six (seven) eight. And on."
    nearly = "one two three four five six seven and eight"
    with text.open("a", encoding="utf-8") as file:
        file.write(f"{quoting}\n{nearly}\n{document(5)}\n")
    corpus = prepare_corpus(text, tmp_path / "out", 300, [SENTENCE])
    assert (corpus.facts["documents"], corpus.facts["duplicates"], corpus.facts["left_out"]) == (803, 1, 1)
    kept = corpus.tokenizer.decode(np.concatenate([corpus.train, corpus.validation]))
    assert "seven and eight" in kept and "seven) eight" not in kept


def test_order_and_split_do_not_depend_on_how_the_text_is_stored(tmp_path, text):
    turned = tmp_path / "turned"
    turned.mkdir()
    lines = text.read_text(encoding="utf-8").splitlines()
    (turned / "a.txt").write_text("\n".join(lines[200:]), encoding="utf-8")
    (turned / "b.txt").write_text("\n".join(lines[:200]), encoding="utf-8")
    a, b = prepare_corpus(text, tmp_path / "a", 300), prepare_corpus(turned, tmp_path / "b", 300)
    assert np.array_equal(a.train, b.train) and np.array_equal(a.validation, b.validation)


def test_tokens_words_and_characters_are_counted(tmp_path, text):
    corpus = prepare_corpus(text, tmp_path / "out", 300)
    facts, end = corpus.facts["validation"], corpus.tokenizer.eos_token_id
    documents = corpus.tokenizer.decode(corpus.validation).split(corpus.tokenizer.eos_token)[:-1]
    assert (facts["documents"], len(documents), int((corpus.validation == end).sum())) == (8, 8, 8)
    assert facts["tokens"] == len(corpus.validation) and corpus.train.dtype == np.uint16
    number = int(documents[0].split()[1].rstrip(":"))
    assert documents[0].strip() == document(number).lower()
    words = [len(corpus.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(d.strip())) for d in documents]
    assert facts["words"] == sum(words) + 8


def test_a_second_call_finds_the_tokens_and_a_changed_one_makes_them_anew(tmp_path, text):
    prepare_corpus(text, tmp_path / "out", 300)
    made = (tmp_path / "out" / "train.npy").stat().st_mtime_ns
    prepare_corpus(text, tmp_path / "out", 300)
    assert (tmp_path / "out" / "train.npy").stat().st_mtime_ns == made
    changed = prepare_corpus(text, tmp_path / "out", 300, [document(8)])
    assert changed.facts["left_out"] == 1 and (tmp_path / "out" / "train.npy").stat().st_mtime_ns != made


def test_an_interrupted_change_is_made_again(tmp_path, text):
    before = prepare_corpus(text, tmp_path / "out", 300)

    def stop(items, task):
        if task == "train text to tokens":
            raise KeyboardInterrupt
        return items

    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(text, tmp_path / "out", 200, progress=stop)
    after = prepare_corpus(text, tmp_path / "out", 300)
    assert len(after.tokenizer) == 300 and np.array_equal(after.validation, before.validation)


@pytest.mark.parametrize("number, rule", [(2, "at least 100 documents are needed"), (100, "at least 128 tokens, got")])
def test_too_little_text_is_refused(tmp_path, number, rule):
    (tmp_path / "a.txt").write_text("\n".join(f"number {i}" for i in range(number)))
    with pytest.raises(ValueError, match=rule):
        prepare_corpus(tmp_path / "a.txt", tmp_path / "out", 300)


def test_progress_sees_every_document(tmp_path, text):
    seen = []
    prepare_corpus(text, tmp_path / "out", 300, progress=lambda items, task: seen.append((task, len(items))) or items)
    assert seen == [("training the tokenizer", 792), ("validation text to tokens", 8), ("train text to tokens", 792)]


def test_several_texts_have_one_tokenizer_and_folders_of_their_own(tmp_path, text):
    (other := tmp_path / "other.txt").write_text(
        "\n".join(f"zebra {i} trots on and on, as zebras do" for i in range(2000)), encoding="utf-8"
    )
    made = prepare_corpora({"first": text, "second": other}, tmp_path / "out", 300)
    assert list(made) == ["first", "second"] and (tmp_path / "out" / "second" / "train.npy").is_file()
    tokenizers = {corpus.tokenizer.backend_tokenizer.to_str() for corpus in made.values()}
    assert len(tokenizers) == 1 and "\u2581zebra" in made["first"].tokenizer.get_vocab()
    assert made["second"].facts["documents"] == 2000


def test_no_text_is_trained_on_what_another_one_validates_on(tmp_path):
    first, own = (
        [f"{i} {beast} {i} {beast} {i} on {i} and {i} on" for i in range(4000)] for beast in ("horse", "zebra")
    )
    second = own + [f"{line} as is said elsewhere too" for line in first[::2]]
    for name, lines in (("first", first), ("second", second)):
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    made = prepare_corpora({name: tmp_path / f"{name}.txt" for name in ("first", "second")}, tmp_path / "out", 300)
    said = {
        (name, part): set().union(*map(word_sequences, _documents(corpus, part)))
        for name, corpus in made.items()
        for part in ("train", "validation")
    }
    assert not said["first", "validation"] & said["second", "train"]
    assert not said["second", "validation"] & said["first", "train"]
    apart = {name: corpus.facts["kept_apart"] for name, corpus in made.items()}
    assert 0 < apart["first"] < 40 and 0 < apart["second"] < 40
    assert made["first"].facts["validation"]["documents"] == 40 and made["second"].facts["left_out"] == 0


def _documents(corpus, part):
    return corpus.tokenizer.decode(getattr(corpus, part)).split(corpus.tokenizer.eos_token)[:-1]


def test_a_second_call_finds_several_texts_and_where_one_has_changed_all_are_made_anew(tmp_path, text):
    (other := tmp_path / "other.txt").write_text("\n".join(f"zebra {i} trots on and on" for i in range(4000)))
    sources, out = {"first": text, "second": other}, tmp_path / "out"
    times = []
    for more in ("", "", "\none more"):
        other.write_text(other.read_text(encoding="utf-8") + more, encoding="utf-8")
        prepare_corpora(sources, out, 300)
        times.append([(out / name / "train.npy").stat().st_mtime_ns for name in sources])
    assert times[0] == times[1] and times[1][0] != times[2][0] and times[1][1] != times[2][1]


def test_batches_of_any_size():
    assert list(batched("abcde", 2)) == [["a", "b"], ["c", "d"], ["e"]]


def test_a_hub_dataset_gives_its_text_column(monkeypatch):
    monkeypatch.setattr("spikegpt_lora.pretrain.corpus.require_reachable", lambda url: None)
    rows = {"a/b": Dataset.from_dict({"text": ["first", " ", "second"]}), "c/d": Dataset.from_dict({"body": ["x"]})}
    monkeypatch.setattr("datasets.load_dataset", lambda repo_id, split: rows[repo_id])
    assert list(read_documents("a/b")) == ["first", "second"]
    with pytest.raises(ValueError, match="c/d must have a column text, found body"):
        list(read_documents("c/d"))
