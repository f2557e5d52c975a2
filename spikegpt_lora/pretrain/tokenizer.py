"""A small byte-pair-encoding tokenizer, trained on the text that its model is trained on.

It reads running text and text that was split into words before (as Subj is) as the same tokens: "It's well-made..." and
"it's well-made . . .". Everything happens inside the tokenizer, so its tokenizer.json needs no code of ours.
"""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, END = "<pad>", "<unk>", "<eos>"

# \x91 to \x97 are cp1252's quotes and dashes in text that was read as latin-1.
_FOLD = {"[‘’‚‛´`\x91\x92]": "'", "[“”„‟\x84\x93\x94]": '"', "[‐−]": "-", "[–—\x96\x97]": " - ", "\x85": "..."}
WORD = r"\w+(?:['-]\w+)*|[^\w\s]"  # a word with its inner apostrophes and hyphens, or one sign


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A BPE tokenizer of at most `vocab_size` tokens; lower-cases, drops accents, splits punctuation from words.

    Decoding writes a space before each word, the first included, so that decoded text may be appended to a prompt;
    closing punctuation stands without one. Case, accents and odd spacing are lost.

    Raises:
        ValueError: `vocab_size` leaves no room beside the three special tokens.
    """
    if vocab_size < 4:
        raise ValueError(f"vocab_size must be >= 4 (three tokens are special), got {vocab_size}")
    bpe = Tokenizer(models.BPE(unk_token=UNKNOWN))
    fold = [normalizers.Replace(Regex(pattern), plain) for pattern, plain in _FOLD.items()]
    bpe.normalizer = normalizers.Sequence(
        [*fold, normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    # The mark before each word, and no suffix behind it: with a suffix, training breaks ties at random.
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Metaspace(prepend_scheme="always")])
    closing, opening = decoders.Replace(Regex(r" (?=[.,!?;:)\]])"), ""), decoders.Replace(Regex(r"(?<=[(\[]) "), "")
    # The mark of a text's first word becomes a space too: what is decoded may be the rest of a text that was begun.
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), closing, opening])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PAD, UNKNOWN, END],
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        model_input_names=["input_ids", "attention_mask"],
    )
