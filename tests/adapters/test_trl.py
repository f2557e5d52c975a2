"""trl's trainers on SpikeGPT (skipped where trl is not installed): they train, what they save comes back, and rows of
several texts are refused."""

import math
import sys

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from running import environment, finished

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForCausalLM, SpikeLoraConfig
from spikegpt_lora.pretrain.tokenizer import train_tokenizer

trl = pytest.importorskip("trl", reason="trl is not installed: pip install spikegpt_lora[test]")

TEXTS = ["a great film, truly moving", "the plot is dull and the acting worse", "he leaves the village at dawn"] * 8
PREFERENCES = {"prompt": ["the film"] * 12, "chosen": [" is great"] * 12, "rejected": [" is dull"] * 12}
ADAPTERS = {
    "spikelora": {"config": SpikeLoraConfig, "spikelora_v_threshold": 0.0},
    "token time": {"config": SpikeLoraConfig, "spikelora_v_threshold": 0.0, "spikelora_time": "token"},
    "lora": {"config": LoraConfig},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a small language model with its tokenizer; its populations fire."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(TEXTS, 60)
    of_tokenizer = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    model = SpikeGPTForCausalLM(
        SpikeGPTConfig(n_embd=16, n_layer=2, eos_token_id=tokenizer.eos_token_id, **of_tokenizer)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def adapter(name):
    settings = dict(ADAPTERS[name])
    return settings.pop("config")(task_type="CAUSAL_LM", r=4, **settings)


def arguments(kind, folder, **changes):
    settings = {
        "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_length": 32, "use_cpu": True,
        "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    return kind(output_dir=str(folder), **settings | changes)


def sft(model, folder, peft_config=None, **changes):
    texts = Dataset.from_dict({"text": TEXTS})
    return trl.SFTTrainer(
        model, arguments(trl.SFTConfig, folder, **changes), train_dataset=texts, peft_config=peft_config
    )


def dpo(model, folder, peft_config=None):
    pairs = Dataset.from_dict(PREFERENCES)
    return trl.DPOTrainer(model, args=arguments(trl.DPOConfig, folder), train_dataset=pairs, peft_config=peft_config)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("trainer_of", [sft, dpo])
def test_adapters_are_trained_saved_and_come_back_bit_for_bit(trainer_of, name, base, tmp_path):
    trainer = trainer_of(base, tmp_path / "run", adapter(name))
    before = {key: p.detach().clone() for key, p in trainer.model.named_parameters()}
    loss = trainer.train().training_loss
    trained = {key for key, p in trainer.model.named_parameters() if not torch.equal(p, before[key])}
    assert math.isfinite(loss)
    assert trained == {key for key in before if "lora_A" in key or "lora_B" in key}
    trainer.save_model(tmp_path / "saved")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    assert torch.equal(loaded.eval()(ids).logits, trainer.model.eval()(ids).logits)


def test_the_whole_model_is_trained_given_as_a_model_or_as_its_folder(base, tmp_path):
    losses = [
        sft(model, tmp_path / str(i)).train().training_loss
        for i, model in enumerate([base, SpikeGPTForCausalLM.from_pretrained(base)])
    ]
    assert losses[0] == losses[1] and math.isfinite(losses[0])


BY_ITS_PATH = """
import sys
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

base, out = sys.argv[1:]
assert "spikegpt_lora" not in sys.modules
trusted = {"trust_remote_code": True}
args = SFTConfig(out, model_init_kwargs=trusted, max_steps=2, max_length=32, use_cpu=True, bf16=False, report_to="none")
trainer = SFTTrainer(base, args, train_dataset=Dataset.from_dict({"text": ["a great film", "the plot is dull"] * 8}))
trainer.train()
print(type(trainer.model), trainer.state.global_step, trainer.state.log_history[-1]["train_loss"])
"""


def test_a_model_is_trained_by_its_path_where_the_package_was_not_imported(base, tmp_path):
    env = environment(HF_MODULES_CACHE=str(tmp_path / "modules"))
    done = finished([sys.executable, "-c", BY_ITS_PATH, base, tmp_path / "run"], env)
    assert done.returncode == 0, done.stderr
    kind, steps, loss = done.stdout.strip().splitlines()[-1].rsplit(maxsplit=2)
    assert "spikegpt_lora.model.SpikeGPTForCausalLM" in kind and steps == "2" and math.isfinite(float(loss))


@pytest.mark.parametrize("changes", [{"packing": True}, {"padding_free": True, "max_length": None}])
@pytest.mark.parametrize("name", ["spikelora", "lora"])
def test_rows_of_several_texts_are_refused(changes, name, base, tmp_path):
    with pytest.raises(ValueError, match="several texts are packed in .* row: give one text a row .trl: packing=False"):
        sft(base, tmp_path, adapter(name), **changes).train()
