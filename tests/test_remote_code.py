"""Saved models where the package was not imported: Auto classes load them with `trust_remote_code=True`, not else."""

import ast
import json
import sys

import pytest
import torch
from helpers import adapted, fresh_classifier
from peft import LoraConfig
from running import environment, finished
from transformers import AutoConfig, AutoModelForSequenceClassification

from spikegpt_lora import SpikeGPTForCausalLM, SpikeGPTForSequenceClassification, SpikeLoraConfig, embedded_checkpoint
from spikegpt_lora.config import REMOTE_CODE, SpikeGPTConfig

IDS = [[5, 6, 7, 8, 9]]


def fresh(tmp_path, code, *arguments):
    """What a new process prints that runs `code`, as a Python value; its caches are its own."""
    code = f"import sys\nimport torch\n{code}"
    env = environment(HF_MODULES_CACHE=str(tmp_path / "modules"))
    done = finished([sys.executable, "-c", code, *arguments], env)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """The folder of a small classifier, and what it answers to IDS."""
    folder = tmp_path_factory.mktemp("classifier")
    model = fresh_classifier().float()
    model.save_pretrained(folder)
    return folder, model(torch.tensor(IDS)).logits.tolist()


def test_the_embedded_model_is_loaded_and_saved_again_but_only_where_its_code_is_trusted(tmp_path):
    code = f"""
from transformers import AutoModelForCausalLM, pipeline
source, out = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False)
except ValueError as error:
    refused = str(error)
imported = "spikegpt_lora" in sys.modules
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
model.save_pretrained(out)
write = pipeline("text-generation", model=source, trust_remote_code=True)
text = write("this film", do_sample=False, max_new_tokens=5)[0]["generated_text"]
print((refused, imported, model(torch.tensor({IDS})).logits[0, -1, :9].tolist(), text))
"""
    refused, imported, logits, text = fresh(tmp_path, code, embedded_checkpoint(), tmp_path / "again")
    assert "Please pass the argument `trust_remote_code=True`" in refused and not imported
    here = SpikeGPTForCausalLM.from_pretrained(embedded_checkpoint())
    assert logits == pytest.approx(here(torch.tensor(IDS)).logits[0, -1, :9].tolist(), abs=1e-4)
    assert text.startswith("this film ") and len(text.split()) > 2
    left = {file.name for file in (tmp_path / "again").iterdir()}
    assert left == {"config.json", "generation_config.json", "model.safetensors", REMOTE_CODE.name}


@pytest.mark.parametrize(
    "auto, config",
    [
        ("peft.AutoPeftModelForSequenceClassification", LoraConfig),
        ("transformers.AutoModelForSequenceClassification", SpikeLoraConfig),
    ],
    ids=["LoRA, by peft", "SpikeLoRA, by transformers"],
)
def test_an_adapter_is_loaded_with_the_classifier_under_it(auto, config, classifier, tmp_path):
    base = SpikeGPTForSequenceClassification.from_pretrained(classifier[0])
    model = adapted(base, config(task_type="SEQ_CLS", r=4), "lora_", dtype=torch.float32)
    model.save_pretrained(tmp_path / "adapter")
    module, _, name = auto.rpartition(".")
    code = f"""
from {module} import {name} as Auto
assert "spikegpt_lora" not in sys.modules
model = Auto.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
print(model(input_ids=torch.tensor({IDS})).logits[0].tolist())
"""
    found = fresh(tmp_path, code, tmp_path / "adapter")
    assert found == pytest.approx(model(torch.tensor(IDS)).logits[0].tolist(), abs=1e-4)
    assert found != pytest.approx(classifier[1][0], abs=1e-2)


def test_where_the_package_is_missing_it_says_what_to_install(classifier, tmp_path):
    code = """
from transformers import AutoConfig
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "spikegpt_lora":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
try:
    AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
except ImportError as error:
    print(repr(str(error)))
"""
    assert "pip install spikegpt_lora" in fresh(tmp_path, code, classifier[0])


def test_where_the_package_is_imported_the_file_is_not_read(classifier, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    folder, expected = classifier
    (folder / REMOTE_CODE.name).rename(tmp_path / "taken away.py")
    for trust in ({}, {"trust_remote_code": True}):
        model = AutoModelForSequenceClassification.from_pretrained(folder, **trust)
        assert model(torch.tensor(IDS)).logits.tolist() == expected
        assert type(AutoConfig.from_pretrained(folder, **trust)) is SpikeGPTConfig
    (tmp_path / "taken away.py").rename(folder / REMOTE_CODE.name)


def test_what_is_saved_names_the_classes_of_the_file_beside_it(classifier):
    folder, _ = classifier
    named = json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"]
    code = (folder / REMOTE_CODE.name).read_text(encoding="utf-8")
    assert code == REMOTE_CODE.read_text(encoding="utf-8")
    (imported,) = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    assert imported.module == "spikegpt_lora" and imported.level == 0
    assert set(named.values()) == {f"{REMOTE_CODE.stem}.{alias.name}" for alias in imported.names}


def test_the_embedded_models_configuration_is_as_it_would_be_saved(tmp_path):
    AutoConfig.from_pretrained(embedded_checkpoint()).save_pretrained(tmp_path)
    files = [folder / "config.json" for folder in (tmp_path, REMOTE_CODE.parent)]
    saved, committed = ({**json.loads(file.read_text()), "transformers_version": None} for file in files)
    assert saved == committed
