"""The small BPE tokenizer: the same every time, readable, and loadable by transformers."""

import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from spikegpt_lora import load_task
from spikegpt_lora.pretrain.tokenizer import train_tokenizer

TRAIN = "from spikegpt_lora import load_task; from spikegpt_lora.pretrain.tokenizer import train_tokenizer; "
TRAIN += "print(train_tokenizer(load_task('subj-mini')['train']['text'], 500).backend_tokenizer.to_str())"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(load_task("subj-mini")["train"]["text"], 500)


def test_training_gives_the_same_tokenizer_in_every_process(tokenizer):
    printed = [subprocess.run([sys.executable, "-c", TRAIN], capture_output=True, text=True).stdout for _ in range(2)]
    assert printed[0].strip() == printed[1].strip() == tokenizer.backend_tokenizer.to_str()


def test_decoding_gives_the_text_back_with_the_space_before_its_first_word(tokenizer):
    text = "don't miss it: the well-made dragon, superb, really, is 40 feet long!"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == " " + text


@pytest.mark.parametrize("rest", ["is a gem", ", well, a gem", "(a gem)"])
def test_a_text_decoded_in_two_parts_is_the_whole_one(tokenizer, rest):
    ids = tokenizer("this dragon")["input_ids"]
    whole = tokenizer.decode(ids + tokenizer(rest)["input_ids"])
    assert tokenizer.decode(ids) + tokenizer.decode(tokenizer(rest)["input_ids"]) == whole


def test_text_that_was_split_before_gives_the_same_tokens(tokenizer):
    running, split = 'It\'s well-made (mostly)... "See" it!', 'it\'s well-made ( mostly ) . . . " see " it !'
    assert tokenizer(running)["input_ids"] == tokenizer(split)["input_ids"]


def test_typographic_signs_are_the_plain_ones_in_every_encoding(tokenizer):
    for signs in ("it\u2019s \u2013 so \u2026", "it\x92s \x96 so \x85"):
        assert tokenizer(signs)["input_ids"] == tokenizer("it's - so ...")["input_ids"]


def test_case_and_accents_are_dropped_and_punctuation_is_split(tokenizer):
    assert tokenizer("Caf\u00e9, FILM!")["input_ids"] == tokenizer("cafe , film !")["input_ids"]


def test_word_ids_follow_words_and_punctuation(tokenizer):
    encoded = tokenizer("superb dragon .")
    assert sorted(set(encoded.word_ids())) == [0, 1, 2]


def test_special_tokens_and_size(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == 500
    assert tokenizer("\u4e2d")["input_ids"].count(1) >= 1


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "a film by nobody , for nobody"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"] and loaded.pad_token == "<pad>"


def test_a_vocabulary_without_room_is_refused():
    with pytest.raises(ValueError, match="vocab_size must be >= 4"):
        train_tokenizer(["a"], 3)
