"""spikegpt_lora classify: one answer a sentence, from arguments, a file or a pipe, and one clear error otherwise."""

import json

import pytest
import torch
from running import command

from spikegpt_lora import embedded_checkpoint
from spikegpt_lora.checkpoint import load_classifier
from spikegpt_lora.commands.classify import classify

SENTENCES = ["a small gem .", "he goes home , and finds that his brother has left .", "Warm , funny , and wise !"]


def rows(done):
    assert done.returncode == 0, done.stderr
    return [line.split("\t") for line in done.stdout.splitlines()]


@pytest.mark.parametrize("part", ["base", "spikelora"])
def test_each_sentence_gets_its_own_answer_whatever_stands_beside_it(finetuned, part):
    model, tokenizer = load_classifier(finetuned / part)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.double().parameters():  # most initial values are 0
        parameter.data += torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    together = list(classify(model, tokenizer, SENTENCES))
    alone = [next(classify(model, tokenizer, [sentence])) for sentence in SENTENCES]
    assert [answer.sentence for answer in together] == SENTENCES
    assert [answer.label for answer in together] == [answer.label for answer in alone]
    assert [answer.probability for answer in together] == pytest.approx([answer.probability for answer in alone])
    assert list(classify(model, tokenizer, SENTENCES, batch_size=2))[2].probability == pytest.approx(
        together[2].probability
    )
    assert len({round(answer.probability, 6) for answer in together}) == 3


def test_arguments_a_file_and_a_pipe_give_the_same_lines(finetuned, tmp_path):
    (tmp_path / "lines.txt").write_bytes(("\r\n\n".join(SENTENCES) + "\n").encode())
    given = rows(command("classify", finetuned / "spikelora", *SENTENCES))
    assert [row[2] for row in given] == SENTENCES
    assert all(row[0] in ("LABEL_0", "LABEL_1") and 0.5 <= float(row[1]) <= 1 for row in given)
    assert rows(command("classify", finetuned / "spikelora", "--file", tmp_path / "lines.txt")) == given
    piped = (tmp_path / "lines.txt").read_bytes()
    assert rows(command("classify", finetuned / "spikelora", piped=piped)) == given


def test_json_has_the_sentence_as_it_was_given(finetuned):
    done = command("classify", finetuned / "base", "--json", "caf\u00e9\tand tea")
    answer = json.loads(done.stdout)
    assert set(answer) == {"label", "probability", "sentence"} and answer["sentence"] == "caf\u00e9\tand tea"


WRONG = {
    "no such folder": (["nowhere", "a"], None, "nowhere holds neither a model (config.json) nor an adapter"),
    "a language model": ([embedded_checkpoint(), "a"], None, "is no SpikeGPT classifier: it has no score.weight"),
    "nothing": (["BASE"], None, "there is nothing to read: give sentences, --file FILE, or a pipe"),
    "an empty pipe": (["BASE"], b"", "stdin must hold one sentence a line, found an empty file"),
    "blank lines": (["BASE"], b" \n\n", "stdin must hold a sentence, found blank ones alone"),
    "no UTF-8": (["BASE"], b"good\nb\xff", "stdin line 2 must be UTF-8 text, found byte 0xff at column 2"),
    "no such file": (["BASE", "--file", "none.txt"], None, "there is no file none.txt"),
    "two sources": (["BASE", "a", "--file", "none.txt"], None, "leave out one of them"),
    "no letters": (["BASE", "\u6620\u753b"], None, "a sentence must have a word in ASCII letters"),
}


@pytest.mark.parametrize("arguments, piped, message", WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_clear_error(finetuned, arguments, piped, message):
    arguments = [finetuned / "base" if one == "BASE" else one for one in arguments]
    done = command("classify", *arguments, piped=piped)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("error:") == 1 and not done.stdout
