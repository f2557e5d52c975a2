"""recipes/instruct_finetune.py as a user runs it, on a tiny SpikeGPT and a tiny Llama (skipped where trl is not)."""

import json
import math
import os
import shutil
import signal

import pytest
import running
import torch
from datasets import DatasetDict
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForCausalLM, SpikeLoraConfig
from spikegpt_lora.checkpoint import load_with_adapter
from spikegpt_lora.finetune.instruct import instruction_trainer
from spikegpt_lora.finetune.trainer import Resumption
from spikegpt_lora.pretrain.tokenizer import train_tokenizer
from spikegpt_lora.tasks.instructions import PLAIN_TEMPLATE, load_instructions
from spikegpt_lora.utils.files import locked

pytest.importorskip("trl", reason="trl is not installed: pip install spikegpt_lora[instruct]")

NAME = "instruct_finetune.py"
FILMS = ["the harbour", "cold river", "the last train", "blue summer"]
QUESTIONS = [(f"who made {film}?", f"{film} was made by her.") for film in FILMS]
CHATS = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    for question, answer in QUESTIONS * 4
]
SPIKING = ["--use-spikelora", "--spikelora-v-threshold", "0"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with two language models, spikegpt/ and llama/, and data, chats.jsonl."""
    folder = tmp_path_factory.mktemp("instruct")
    texts = [f"user: {question} assistant: {answer}" for question, answer in QUESTIONS] * 4
    tokenizer = train_tokenizer(texts, 90)
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    tokens |= {"vocab_size": len(tokenizer), "bos_token_id": None}
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    models = {
        "spikegpt": SpikeGPTForCausalLM(SpikeGPTConfig(n_embd=64, n_layer=2, **tokens)),
        "llama": LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **sizes, **tokens)),
    }
    for name, model in models.items():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write(folder / "chats.jsonl", CHATS)
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(here, out, *arguments, model="spikegpt", data="chats.jsonl"):
    settings = ["--base-model", here / model, "--data-path", here / data, "--output-dir", out, "--batch-size", "4"]
    precision = [] if "--precision" in arguments else ["--precision", "float32"]  # on any processor
    return running.here(NAME, *settings, *precision, "--device", "cpu", "--num-epochs", "1", *arguments)


def refused(done, message):
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1


@pytest.mark.parametrize("method", [[], SPIKING, [*SPIKING, "--spikelora-time", "token"]], ids=str)
@pytest.mark.parametrize("model", ["spikegpt", "llama"])
def test_an_adapter_is_trained_measured_and_comes_back_by_peft_alone(here, tmp_path, model, method):
    done = recipe(here, tmp_path, *method, model=model)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["rows"] == {"train": 14, "validation": 2, "left out": 0} and record["steps"] == 4
    assert math.isfinite(record["validation_loss"]) and (record["sparsity"] is None) == (not method)
    assert {entry["eval_loss"] for entry in record["log"] if "eval_loss" in entry} == {record["validation_loss"]}
    assert (tmp_path / "README.md").read_text() in done.stdout and not (tmp_path / "training").exists()
    adapter = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(adapter.peft_config["default"]) is (SpikeLoraConfig if method else LoraConfig)
    ids = torch.tensor([[5, 6, 7, 8]])
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(here / model), tmp_path).eval()
    assert torch.equal(adapter(ids).logits, again(ids).logits)
    with again.disable_adapter():
        assert not torch.equal(adapter(ids).logits, again(ids).logits)


@pytest.mark.parametrize("model", ["spikegpt", "llama"])
def test_what_it_leaves_answers_in_generate(here, tmp_path, model):
    recipe(here, tmp_path, *SPIKING, "--spikelora-time", "token", "--num-epochs", "12", model=model)
    done = running.here("generate.py", "--model", tmp_path, "--chat", "--prompt", QUESTIONS[0][0], "--temperature", "0")
    assert done.returncode == 0, done.stderr
    written, tokenizer = load_with_adapter(str(tmp_path))
    asked = tokenizer.apply_chat_template(
        CHATS[0]["messages"][:1], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    ids = written.generate(**asked, do_sample=False, max_new_tokens=100)[0, asked["input_ids"].shape[1] :]
    assert done.stdout.strip() == tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_an_adapter_whose_base_model_is_gone_is_refused_by_name(here, tmp_path):
    shutil.copytree(here / "llama", tmp_path / "base")
    recipe(here, tmp_path / "out", "--base-model", tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    done = running.here("generate.py", "--model", tmp_path / "out")
    refused(done, f"the base model of the adapter in {tmp_path / 'out'} is not to be had: no language model at")
    refused(
        recipe(here, tmp_path / "more", "--base-model", tmp_path / "out"), "out holds an adapter, which is no whole"
    )


def test_a_model_without_some_of_its_weights_is_refused(here, tmp_path):
    shutil.copytree(here / "llama", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    message = "base is no whole language model: it has no model.norm.weight"
    refused(recipe(here, tmp_path / "out", "--base-model", tmp_path / "base"), message)


def test_chat_needs_a_template(here):
    done = running.here("generate.py", "--model", here / "spikegpt", "--chat")
    refused(done, "--chat needs a tokenizer with a chat template")


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"
LEARNED = {  # rows, and the texts that are learned of them
    "messages": (
        {"messages": [*CHATS[0]["messages"], *CHATS[1]["messages"]]},
        [f"{QUESTIONS[0][1]}<eos>", f"{QUESTIONS[1][1]}<eos>"],
    ),
    "completion": ({"prompt": "who made it?", "completion": " her."}, ["her.<eos>"]),
    "instruction": ({"instruction": "say", "input": "who made it", "output": "her."}, ["her.<eos>"]),
    "text": ({"text": "who made it? her."}, ["who made it? her.<eos>"]),
}


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, TEMPLATE], ids=["plain", "of its own"])
@pytest.mark.parametrize("form", LEARNED)
def test_the_loss_falls_on_answers_alone(here, tmp_path, form, template):
    row, expected = LEARNED[form]
    data = load_instructions(str(write(tmp_path / "data.jsonl", [row])))
    trainer = trainer_of(here, tmp_path, data, template)
    learned = []
    for tokens in trainer.train_dataset.to_list():
        batch = trainer.data_collator([tokens])
        labels, ids = batch["labels"][0], batch["input_ids"][0]
        assert torch.equal(labels[labels != -100], ids[labels != -100])
        learned.append(trainer.processing_class.decode(labels[labels != -100]).strip())
    plain = [text.replace(" <eos>", "<eos>").replace("\n", "") for text in learned]
    assert plain == expected


def trainer_of(here, folder, data, template=PLAIN_TEMPLATE, **settings):
    model = AutoModelForCausalLM.from_pretrained(here / "spikegpt")
    tokenizer = AutoTokenizer.from_pretrained(here / "spikegpt")
    tokenizer.chat_template = template
    adapter = SpikeLoraConfig(task_type="CAUSAL_LM", r=2, spikelora_v_threshold=0.0)
    settings = {"use_cpu": True, "bf16": False, "max_length": 64} | settings
    return instruction_trainer(model, tokenizer, DatasetDict(data), adapter, output_dir=str(folder), **settings)


@pytest.mark.parametrize("form", LEARNED)
def test_each_form_of_rows_is_trained_on(here, tmp_path, form):
    write(tmp_path / "data.jsonl", [LEARNED[form][0]] * 4)
    done = recipe(here, tmp_path / "out", *SPIKING, data=tmp_path / "data.jsonl")
    assert done.returncode == 0, done.stderr
    assert ("--chat" in done.stdout) == (form in ("messages", "instruction"))


def test_rows_whose_answer_is_cut_off_are_counted_and_said(here, tmp_path):
    long = {"prompt": "the harbour " * 30, "completion": "her."}
    data = write(tmp_path / "data.jsonl", [long, *({"prompt": "who?", "completion": "her."} for _ in range(5))])
    settings = ["--val-set-size", "0", "--cutoff-len", "16"]
    done = recipe(here, tmp_path / "out", *settings, data=data)
    assert done.returncode == 0, done.stderr
    assert "rows left out, because --cutoff-len 16 cuts off the whole answer: 1" in done.stdout
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["rows"] == {"train": 5, "left out": 1} and "validation_loss" not in record
    data = write(tmp_path / "long.jsonl", [long] * 3)
    refused(recipe(here, tmp_path / "none", *settings, data=data), "cuts off the whole answer of every train row")


class Stop(TrainerCallback):
    """SIGTERM in the middle of a step."""

    def __init__(self, at):
        self.at = at

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("at", [1, 3, 7])  # of 4 steps an epoch, 8 in all; 3 and 7: the last ones
def test_a_run_that_was_stopped_goes_on_to_the_same_figures(here, tmp_path, monkeypatch, at):
    command = [*SPIKING, "--num-epochs", "2", "--lora-dropout", "0.2"]
    assert recipe(here, tmp_path / "whole", *command).returncode == 0
    begin = Resumption.__init__

    def stopped(self, stop):
        begin(self, stop)
        self.on_step_begin = Stop(at).on_step_begin

    with monkeypatch.context() as patch:
        patch.setattr(Resumption, "__init__", stopped)
        done = recipe(here, tmp_path / "broken", *command)
    assert done.returncode == 143 and "the same command goes on from here" in done.stderr
    assert not (tmp_path / "broken" / "run.json").exists()
    changed = recipe(here, tmp_path / "broken", *command, "--lora-r", "4")
    refused(changed, "holds a run of other settings (lora_r was 8, is 4)")
    assert recipe(here, tmp_path / "broken", *command).returncode == 0
    whole, broken = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "broken"))
    assert whole["validation_loss"] == broken["validation_loss"] and whole["steps"] == broken["steps"] == 8
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert weights[0] == weights[1]


def test_a_finished_run_is_shown_again_and_not_repeated(here, tmp_path):
    first = recipe(here, tmp_path)
    before = (tmp_path / "run.json").read_bytes()
    again = recipe(here, tmp_path)
    assert again.returncode == 0 and (tmp_path / "run.json").read_bytes() == before
    assert again.stdout == first.stdout.split("\n", 1)[1]  # without the line on precision


REFUSALS = [
    (["--spikelora-gate", "binary"], "--spikelora-gate is a setting of the gate: give --use-spikelora too"),
    (["--packing"], "--packing puts several texts in a row, and a SpikeGPT carries its state from one to the next"),
    (["--packing", *SPIKING, "--spikelora-time", "token"], "--spikelora-time token carries membranes from one to the"),
    (["--push-to-hub"], "--push-to-hub and --hub-model-id belong together: give both, or none"),
    (["--push-to-hub", "--hub-model-id", "me/it"], "--push-to-hub: the hub takes nothing from here (HF_HUB_OFFLINE is"),
    (["--base-model", "nowhere"], "no language model at 'nowhere'"),
    (["--data-path", "nowhere.jsonl"], "got nowhere.jsonl: no such file"),
    (["--val-set-size", "16"], "must have a row left to train on, has 16, 16 for validation"),
    (["--lora-target-modules", "nothing"], "Target modules {'nothing'} not found in the base model"),
    (["--learning-rate", "1e30", "--num-epochs", "4"], "it diverged: the "),
]


@pytest.mark.parametrize("arguments, message", REFUSALS, ids=[message for _, message in REFUSALS])
def test_what_cannot_be_is_refused_in_one_sentence(here, tmp_path, arguments, message):
    refused(recipe(here, tmp_path / "out", *arguments), message)
    assert not list((tmp_path / "out").glob("training/*"))


@pytest.mark.parametrize("value", ["-1", "1.5", "nan", "inf"])
def test_a_validation_set_is_a_number_of_rows_or_a_share(here, tmp_path, value):
    done = recipe(here, tmp_path, "--val-set-size", value)
    assert done.returncode == 2 and f"must be a whole number of rows, or a share below 1, got {value}" in done.stderr


def test_a_bad_row_is_named_before_anything_is_made(here, tmp_path):
    data = write(tmp_path / "data.jsonl", [CHATS[0], {"foo": 1}])
    refused(recipe(here, tmp_path / "out", data=data), "data.jsonl row 2: messages must be a list of role and content")
    assert not (tmp_path / "out").exists()


def test_one_run_a_folder(here, tmp_path):
    with locked(tmp_path):
        refused(recipe(here, tmp_path), f"another run (pid {os.getpid()}) works in {tmp_path}")


@pytest.mark.parametrize("arguments, package", [([], "trl"), (["--quantize"], "bitsandbytes")])
def test_a_package_that_is_missing_is_named_with_its_extra(here, tmp_path, monkeypatch, arguments, package):
    find = running.module(NAME).importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find(name))
    extra = {"trl": "instruct", "bitsandbytes": "qlora"}[package]
    message = f'this needs {package}, which is not installed: pip install "spikegpt_lora[{extra}]"'
    refused(recipe(here, tmp_path, *arguments), message)


def test_packed_rows_of_a_model_that_keeps_texts_apart_are_trained_on(here, tmp_path):
    done = recipe(here, tmp_path, "--packing", *SPIKING, model="llama")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run.json").read_text())["steps"] < 4


@pytest.mark.parametrize("method", [[], SPIKING], ids=str)
@pytest.mark.parametrize("model", ["spikegpt", "llama"])
def test_a_quantised_base_is_trained_on(here, tmp_path, model, method):
    pytest.importorskip("bitsandbytes")
    done = recipe(here, tmp_path, "--quantize", *method, model=model)
    assert done.returncode == 0, done.stderr
    adapter = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert math.isfinite(adapter(torch.tensor([[5, 6, 7]])).logits.sum())


def test_integer_spikes_are_not_quantised(here, tmp_path):
    pytest.importorskip("bitsandbytes")
    done = recipe(here, tmp_path, "--quantize", "--base-model", "embedded")
    refused(done, "those of embedded read integer spikes (matrix_spikes 'integer')")


def test_the_quick_start_of_the_authors_works_as_it_is(here, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(here / "llama")
    config = SpikeLoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], use_spikelora=True,
        spikelora_v_threshold=0.1,
    )  # fmt: skip
    model, ids = get_peft_model(base, config), torch.tensor([[5, 6, 7, 8, 9]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = model(ids, labels=ids).loss
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(ids, labels=ids).loss < before
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(here / "llama"), tmp_path)
    assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)
