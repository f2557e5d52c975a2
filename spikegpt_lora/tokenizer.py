"""A small byte-pair-encoding tokenizer trained on the text at hand, for models that start from scratch."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, END = "<pad>", "<unk>", "<eos>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A BPE tokenizer of at most `vocab_size` tokens; lower-cases, drops accents, splits punctuation from words.

    Raises:
        ValueError: `vocab_size` leaves no room beside the three special tokens.
    """
    if vocab_size < 4:
        raise ValueError(f"vocab_size must be >= 4 (three tokens are special), got {vocab_size}")
    bpe = Tokenizer(models.BPE(unk_token=UNKNOWN))
    bpe.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(r"[\w']+|[^\w\s']+"), behavior="removed", invert=True)
    # The mark before each word, and no suffix behind it: with a suffix, training breaks ties at random.
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Metaspace(prepend_scheme="always")])
    bpe.decoder = decoders.Metaspace()
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
