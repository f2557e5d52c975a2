"""The README.md of a language model, and of a fine-tuned model or adapter, in the hub's format."""

import json
from collections.abc import Sequence

from huggingface_hub import EvalResult, ModelCardData

from ..observe.matrix_inputs import HEAD, MatrixInput, cells
from ..tasks.registry import TASKS
from ..utils.hub import hub_id
from .markdown import table
from .results import title_of


def _head(started_from: str | None, datasets: Sequence[str], tags: Sequence[str] = (), **facts) -> str:
    """What a hub reads of a card; it knows models and data by their ids alone."""
    data = ModelCardData(
        language="en",
        license="bsd-2-clause",
        base_model=hub_id(started_from),
        datasets=list(datasets) or None,
        tags=["spikegpt", "spiking", *tags],
        **facts,
    )
    return f"---\n{data.to_yaml()}\n---"


def model_card(results: dict, record: dict) -> str:
    """The README.md of one run's folder, in the hub's format: what it is, what it scored, how to load and repeat it."""
    adapter = record["adapters"] or {}
    activity = [f"- {key.replace('_', ' ')}: {value:.4f}" for key, value in adapter.items() if isinstance(value, float)]
    versions = [f"{name} {version}" for name, version in results["versions"].items()]
    spiking = adapter.get("sparsity") is not None
    return _CARD.format(
        head=_model_head(results, record),
        loading=_WHOLE if not adapter else _ADAPTER.format(known=_SPIKELORA if spiking else _LORA),
        task=results["task"],
        name=title_of(record),
        start=record.get("start", "starts from"),
        model=results["model"],
        test_sentences=results["data"]["test"],
        precision=results["precision"],
        validation=_validation(record),
        details="\n".join([*activity, "- " + ", ".join(versions)]),
        options=json.dumps(results["options"] | {"settings": record["settings"]}, indent=1),
        test_accuracy=100 * record["test_accuracy"],
        **{key: record[key] for key in ("seed", "trainable_parameters", "total_parameters")},
    )


def _model_head(results: dict, record: dict) -> str:
    task, method = results["task"], record["method"]
    on_hub, kind = TASKS[task].hub_id if task in TASKS else None, "text-classification"
    accuracy = EvalResult(
        task_type=kind,
        dataset_type=on_hub or task,
        dataset_name=f"{task}, {results['data']['test']:,} sentences kept for the test",  # no split of the hub's
        metric_type="accuracy",
        metric_value=round(record["test_accuracy"], 4),
    )
    return _head(
        results["model"],
        [on_hub] if on_hub else [],
        [method],
        library_name="peft" if record["adapters"] else "transformers",
        pipeline_tag=kind,
        model_name=f"spikegpt-{task}-{method}-seed{record['seed']}",
        eval_results=[accuracy],
    )


def _validation(record: dict) -> str:
    epoch = f"epoch {record['best_epoch']} of {record['settings']['epochs']}"
    if record["validation_accuracy"] is None:
        return f"{epoch}: nothing was picked"
    return f"validation accuracy {100 * record['validation_accuracy']:.2f} % ({epoch}, picked there)"


_CARD = """{head}

# SpikeGPT on {task}: {name}, seed {seed}

- {start} ../../base/seed{seed} (model: {model})
- trained parameters: {trainable_parameters:,} of {total_parameters:,}
- test accuracy {test_accuracy:.2f} % on {test_sentences:,} sentences
- {validation}
- trained and tested in {precision}
{details}

{loading}

Made by recipes/subj_finetune.py with these settings:

```json
{options}
```

Fine-tuned on the sentences of {task} alone: not meant for other text. One seed says little; see results.md.
"""

_WHOLE = """```python
from transformers import AutoModelForSequenceClassification

# trust_remote_code imports spikegpt_lora, which must be installed
model = AutoModelForSequenceClassification.from_pretrained("FOLDER", trust_remote_code=True)
```"""

_ADAPTER = """```python
import spikegpt_lora
from peft import AutoPeftModelForSequenceClassification

model = AutoPeftModelForSequenceClassification.from_pretrained("FOLDER")
```

{known}
adapter_config.json names the folder of its base model as it was then; after both were moved together,
`spikegpt_lora.checkpoint.load_adapted(spikegpt_lora.SpikeGPTForSequenceClassification, "FOLDER")` finds it."""

_SPIKELORA = "peft can read an adapter_config.json of peft_type SPIKELORA only after `import spikegpt_lora`."
_LORA = "Instead of `import spikegpt_lora`, `trust_remote_code=True` will do where it is installed."


USE = """```python
from transformers import pipeline

# trust_remote_code imports spikegpt_lora, which must be installed
write = pipeline("text-generation", model="FOLDER", trust_remote_code=True)
```"""


def language_model_head(started_from: str | None = None, datasets: Sequence[str] = ()) -> str:
    """The head of a language model's README.md.

    Args:
        started_from: the model that it was trained from; named where it is a hub id.
        datasets: hub ids of what it was trained on.
    """
    return _head(started_from, datasets, library_name="transformers", pipeline_tag="text-generation")


def instructed_card(record: dict) -> str:
    """The README.md of an adapter that recipes/instruct_finetune.py trained, from what its run.json holds."""
    rows, measured = (
        record["rows"],
        [f"- {name}: {record[name]:.4f}" for name in _MEASURED if record.get(name) is not None],
    )
    return _INSTRUCTED.format(
        base=record["model"],
        data=record["task"],
        method="SpikeLoRA" if record["options"]["use_spikelora"] else "LoRA",
        rows=", ".join(f"{number:,} {what}" for what, number in rows.items()),
        measured="\n".join(measured),
        details=", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        options=json.dumps(record["options"], indent=1),
        **{key: record[key] for key in ("steps", "precision", "trainable_parameters", "total_parameters")},
    )


_MEASURED = ("validation_loss", "validation_perplexity", "sparsity")

_INSTRUCTED = """---
library_name: peft
pipeline_tag: text-generation
---

# {method} on {base}: answers learned from {data}

- rows: {rows}; {steps:,} steps in {precision}
- trained parameters: {trainable_parameters:,} of {total_parameters:,}
{measured}
- {details}

```python
import spikegpt_lora
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")
```

Made by recipes/instruct_finetune.py with these settings:

```json
{options}
```

Losses are in nats a token that is learned.
"""


def language_model_card(record: dict) -> str:
    """The README.md of a pre-trained model, from what its pretraining.json holds."""
    options, config, texts = record["options"], record["config"], record["texts"]
    read = "integer spikes" if config["matrix_spikes"] == "integer" else "real numbers"
    started = f", from {record['started_from']}" if record["started_from"] else ""
    taught = f", towards what {record['teacher']} says of each next token" if record.get("teacher") else ""
    pairs = f"; beside it, each step tells {options['pairs']} pairs of neighbouring sentences from one another"
    more = taught + pairs * bool(options["pairs"])
    sections = [
        language_model_head(record["started_from"], record.get("datasets", [])),
        f"# SpikeGPT language model, {record['parameters'] / 1e6:.1f} M parameters",
        f"{config['n_layer']} layers, width {config['n_embd']}, {config['vocab_size']:,} tokens (lower-case BPE); "
        f"tau 2, threshold 1, reset to 0; its matrices read {read}; weights in bfloat16. Made by recipes/pretrain.py: "
        "settings and measures are in pretraining.json, the loss of every 50 steps is in loss.csv.",
        USE,
        "\n".join(map(_text, texts.items()))
        + f"\n- training{started}: {options['steps']:,} steps of {options['batch_size']} x {options['length']} tokens "
        f"({record['tokens'] / 1e6:.1f} M) in {record['hours']:.2f} hours; AdamW, rate {options['learning_rate']:g}, "
        f"in {record['precision']}, "
        f"the last {options['decay']:.0%} of the steps decay{more}",
        "Validation: documents that were not trained on. A sign counts as a word, a document's end too; 5-grams "
        "are those of all texts:",
        table(
            ["", "nats a token", "perplexity a token", "perplexity a word", "bits a character"],
            [
                [f"{name}, {title}", *map(_short, facts[key].values())]
                for name, facts in texts.items()
                for title, key in (("this model", "model"), ("5-gram Kneser-Ney", "kneser_ney"))
            ],
        ),
        f"What it writes after a document's end, {len(record['samples'])} times, unpicked (temperature 0.8, the "
        "likeliest tokens that make up 0.9; seeds from 0 on):",
        "\n".join(f"- {text}" for text in record["samples"]),
        "Firing on validation text: spikes a neuron and token; dead neurons never fire, saturated ones always do.",
        table(
            ["population", "rate", "dead %", "saturated %"],
            [
                [name, f"{row['rate']:.3f}", f"{100 * row['dead']:.1f}", f"{100 * row['saturated']:.1f}"]
                for name, row in record["firing"].items()
            ],
        ),
        f"What matrices read on validation text; a token reads {record['weight_reads']:.1%} of the blocks' weights:",
        table(HEAD, cells([MatrixInput(**row) for row in record["matrices"]])),
        "![training loss](loss.png)",
    ]
    return "\n\n".join(sections) + "\n"


def _text(named: tuple[str, dict]) -> str:
    name, facts = named
    return (
        f"- {name}: {facts['train']['documents']:,} documents, {facts['train']['tokens']:,} tokens, read by "
        f"{facts['streams']} of the streams; left out: {facts['duplicates']:,} duplicates and {facts['left_out']:,} "
        "documents that share 8 words in a row with an evaluation sentence"
        + f", {facts['kept_apart']:,} with a validation document of another text"
        * bool(facts["kept_apart"])
    )


def _short(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"
