"""Plain text for language-model pre-training: documents in, two rows of token ids (training, validation) out.

    documents -> without duplicates -> without those that share 8 words in a row with an evaluation sentence
    -> in the order of their sha256; the first 1 % are for validation -> tokens, <eos> after each document

Order and split depend on the documents alone, not on how they were stored, so they can be made again anywhere.
"""

import bz2
import gzip
import hashlib
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from ..checkpoint import load_tokenizer
from ..tasks.registry import TASKS, load_task
from ..tasks.text import to_ascii
from ..utils.errors import DamagedFile, read_json
from ..utils.files import whole_file, whole_files, write_json
from ..utils.hub import require_reachable
from .tokenizer import train_tokenizer

OPENERS = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
KEPT_APART = ["subj", "subj-mini"]  # whose sentences no model of ours was trained on
SEQUENCE = 8  # words in a row that two texts must not share
VALIDATION = 0.01  # share of the documents
SHORTEST = 128  # tokens that can be measured
Progress = Callable[[Iterable, str], Iterable]


@dataclass
class Corpus:
    """A text as tokens.

    train, validation: token ids `(N,)`, uint16 or int32, memory-mapped; the tokenizer that made them; and facts: counts
    of documents, of duplicates, of those left_out and (of several texts) kept_apart, and of each split's documents,
    tokens, words (one more a document, for its end) and characters.
    """

    train: np.ndarray
    validation: np.ndarray
    tokenizer: PreTrainedTokenizerFast
    facts: dict


def read_documents(source: str | Path) -> Iterator[str]:
    """The documents of a text file (one a line; .xz, .gz and .bz2 too), of a folder's .txt files, or of the column
    `text` of a dataset on the Hugging Face hub.

    Raises:
        FileNotFoundError: no such file or folder, and no such dataset within reach.
        ValueError: a folder without text files, text that is not UTF-8, or a dataset without the column.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if ".txt" in f.suffixes and f.suffix in {".txt", *OPENERS})
        if not files:
            raise ValueError(f"{path} must hold .txt files (.xz, .gz, .bz2 too), found none")
    elif path.is_file():
        files = [path]
    else:
        yield from _read_hub(str(source))
        return
    for file in files:
        try:
            with OPENERS.get(file.suffix, open)(file, "rt", encoding="utf-8", newline="\n") as lines:
                yield from (line.strip() for line in lines if line.strip())
        except (UnicodeDecodeError, lzma.LZMAError, zlib.error, OSError, EOFError) as error:
            raise ValueError(f"{file} must be UTF-8 text, plain or in a whole archive: {error}") from error


def _read_hub(repo_id: str) -> Iterator[str]:
    from datasets import load_dataset

    try:
        require_reachable(f"https://huggingface.co/datasets/{repo_id}")
        rows = load_dataset(repo_id, split="train")
    except Exception as error:  # the HTTP library's own kinds are no OSError
        raise FileNotFoundError(f"{repo_id!r} is no file or folder, nor a dataset within reach: {error}") from error
    if "text" not in rows.column_names:
        raise ValueError(f"dataset {repo_id} must have a column text, found {', '.join(rows.column_names)}")
    yield from (text for text in rows["text"] if text and text.strip())


def add_left_out(add: Callable) -> None:
    """The arguments of `evaluation_sentences` for a command line; `add` is its parser's add_argument."""
    add(
        "--decontaminate",
        default=KEPT_APART,
        nargs="+",
        metavar="TASK",
        help="tasks, or files of sentences (tabs part them), whose quotations are left out; none: leave out nothing",
    )
    add("--data-dir", type=Path, help="folder with the tasks; else SPIKEGPT_LORA_DATA, else the hub")


def evaluation_sentences(names: list[str], data_dir: Path | None) -> list[str]:
    """The sentences of tasks and files, by name, that a model will be judged on; "none" names nothing.

    Args:
        names: of tasks, or files of sentences that tabs part.
        data_dir: a folder with the tasks.

    Raises:
        ValueError: neither a task nor a file. FileNotFoundError: a task's data are not to be had.
    """
    sentences = []
    for name in [name for name in names if name != "none"]:
        if name in TASKS:
            task = load_task(name, None if name == "subj-mini" else data_dir)
            sentences += [text for split in task.values() for text in split["text"]]
        elif Path(name).is_file():
            lines = read_documents(name)
            sentences += [field for line in lines for field in line.split("\t")]
        else:
            raise ValueError(f"--decontaminate takes {', '.join(TASKS)}, a file, or none; got {name!r}")
    return sentences


def word_sequences(text: str) -> set[str]:
    """Every run of 8 words (letters and digits, lower-case ASCII) in `text`; none if it is shorter."""
    joined = re.sub(r" (n't|'(?:s|re|ve|ll|d|m))\b", r"\1", to_ascii(text))  # some sources write "ca n't"
    words = re.findall(r"[a-z0-9]+", joined)
    return {" ".join(words[i : i + SEQUENCE]) for i in range(len(words) - SEQUENCE + 1)}


def prepare_corpus(
    source: str | Path,
    directory: str | Path,
    tokenizer: int | PreTrainedTokenizerFast,
    evaluation: Iterable[str] = (),
    progress: Progress = lambda items, task: items,
) -> Corpus:
    """The text at `source` as tokens, kept in `directory` and found there again if nothing has changed.

    Args:
        source: see `read_documents`; it is held in memory once.
        tokenizer: or the size of the BPE tokenizer to be trained on the training documents.
        evaluation: sentences that the model will be judged on; documents that quote one are left out.
        progress: called with what is gone through, and what for; to draw a bar, return it wrapped.

    Raises:
        FileNotFoundError, ValueError: as `read_documents`; or nothing is left for training or validation.
    """
    (corpus,) = _prepare({Path(directory): source}, tokenizer, evaluation, progress)
    return corpus


def prepare_corpora(
    sources: Mapping[str, str | Path],
    directory: str | Path,
    tokenizer: int | PreTrainedTokenizerFast,
    evaluation: Iterable[str] = (),
    progress: Progress = lambda items, task: items,
) -> dict[str, Corpus]:
    """Several texts of one tokenizer, by name, each kept in a folder of its name; see `prepare_corpus`.

    What two of them say may be trained on twice, but nothing is that shares 8 words in a row with a validation document
    of another text; facts count it as kept_apart.
    """
    places = {Path(directory) / name: source for name, source in sources.items()}
    return dict(zip(sources, _prepare(places, tokenizer, evaluation, progress)))


def _prepare(places: Mapping[Path, str | Path], tokenizer, evaluation, progress) -> list[Corpus]:
    everything = {place: list(read_documents(source)) for place, source in places.items()}
    documents = {place: sorted(set(texts), key=_digest) for place, texts in everything.items()}
    evaluation = sorted(set(evaluation))
    maker = str(tokenizer) if isinstance(tokenizer, int) else tokenizer.backend_tokenizer.to_str()
    if len(places) > 1:  # what is validated on, and the tokenizer, depend on all texts
        maker += _digest("\n".join(map(_digest, chain(*documents.values()))))
    keys = {place: _digest("\n".join(map(_digest, texts + evaluation)) + maker) for place, texts in documents.items()}
    if any(_facts(place).get("key") != key for place, key in keys.items()):
        known = set().union(*map(word_sequences, evaluation))
        kept = {place: _parts(_without(documents[place], known, progress)) for place in places}
        whole = {place: sum(map(len, parts.values())) for place, parts in kept.items()}
        if len(places) > 1:
            _part(list(kept.values()), progress)
        if isinstance(tokenizer, int):
            texts = list(chain(*(parts["train"] for parts in kept.values())))
            tokenizer = train_tokenizer(progress(texts, "training the tokenizer"), tokenizer)
        for place, parts in kept.items():
            counts = {
                "documents": len(everything[place]),
                "duplicates": len(everything[place]) - len(documents[place]),
                "left_out": len(documents[place]) - whole[place],
                "kept_apart": whole[place] - sum(map(len, parts.values())),
            }
            _write(place, parts, tokenizer, {"key": keys[place], **counts}, progress)
    return [_read(place) for place in places]


def _read(directory: Path) -> Corpus:
    facts = _facts(directory)
    tokens = [_load(directory / f"{name}.npy", facts[name]["tokens"]) for name in ("train", "validation")]
    return Corpus(*tokens, load_tokenizer(directory / "tokenizer"), facts)


def _load(path: Path, tokens: int) -> np.ndarray:
    try:
        ids = np.load(path, mmap_mode="r")
    except (OSError, EOFError, ValueError) as error:
        raise DamagedFile(f"{path} is damaged ({error}): delete {path.parent}, and it is made again") from error
    if ids.shape != (tokens,):
        raise DamagedFile(f"{path} must hold {tokens:,} tokens, has {ids.shape}: delete {path.parent}")
    return ids


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _facts(directory: Path) -> dict:
    """What corpus.json says; nothing where there is none, or a damaged one: it is then made again."""
    try:
        return read_json(directory / "corpus.json", keys=("key", "train", "validation"))
    except (FileNotFoundError, DamagedFile):
        return {}


def _without(documents: list[str], known: set[str], progress: Callable) -> list[str]:
    """`documents` that share no word sequence with `known`."""
    if not known:
        return documents
    documents = progress(documents, "looking for evaluation sentences")
    return [text for text in documents if known.isdisjoint(word_sequences(text))]


def _parts(documents: list[str]) -> dict[str, list[str]]:
    share = round(len(documents) * VALIDATION)
    parts = {"validation": documents[:share], "train": documents[share:]}
    if not all(parts.values()):
        raise ValueError(f"at least 100 documents are needed, one of them for validation; got {len(documents)}")
    return parts


def _part(texts: list[dict[str, list[str]]], progress: Callable) -> None:
    """Leaves out of each text's training, in place, what shares a word sequence with what another one validates on."""
    validated = [set().union(*map(word_sequences, parts["validation"])) for parts in texts]
    for number, parts in enumerate(texts):
        others = set().union(*validated[:number], *validated[number + 1 :])
        documents = progress(parts["train"], "looking for validation sentences")
        parts["train"] = [text for text in documents if others.isdisjoint(word_sequences(text))]


def _write(directory: Path, parts: dict[str, list[str]], tokenizer, facts: dict, progress: Callable) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "corpus.json").unlink(missing_ok=True)  # until all is written, nothing here belongs together
    with whole_files(directory / "tokenizer", last="tokenizer_config.json") as temporary:
        tokenizer.save_pretrained(temporary)
    for name, part in parts.items():
        ids, words = _tokens(progress(part, f"{name} text to tokens"), tokenizer)
        if len(ids) < SHORTEST:
            raise ValueError(
                f"the {name} text must have at least {SHORTEST} tokens, got {len(ids)}: give more documents"
            )
        with whole_file(directory / f"{name}.npy") as temporary:
            np.save(temporary, ids)
        characters = sum(map(len, part))
        facts[name] = {"documents": len(part), "tokens": len(ids), "words": words, "characters": characters}
    write_json(directory / "corpus.json", facts)


def _tokens(documents: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> tuple[np.ndarray, int]:
    """Token ids of all documents in one row, and how many words (and ends) they are."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32
    pieces, words = [], 0
    for batch in batched(documents, 256):
        for encoding in tokenizer.backend_tokenizer.encode_batch(batch):
            pieces.append(np.array([*encoding.ids, tokenizer.eos_token_id], dtype))
            words += 1 + (encoding.word_ids[-1] + 1 if encoding.word_ids else 0)
    return np.concatenate(pieces), words


def batched(items: Iterable, size: int) -> Iterator[list]:
    """`items` in lists of `size`, the last one shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch
