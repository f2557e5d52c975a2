"""The README.md of a language model, and of a fine-tuned model or adapter, in the hub's format."""

import json

from ..observe.matrix_inputs import HEAD, MatrixInput, cells
from .markdown import table
from .results import title_of


def model_card(results: dict, record: dict) -> str:
    """The README.md of one run's folder, in the hub's format: what it is, what it scored, how to load and repeat it."""
    adapter = record["adapters"] or {}
    activity = [f"- {key.replace('_', ' ')}: {value:.4f}" for key, value in adapter.items() if isinstance(value, float)]
    versions = [f"{name} {version}" for name, version in results["versions"].items()]
    return _CARD.format(
        library="peft" if adapter else "transformers",
        auto="AutoPeftModelForSequenceClassification" if adapter else "AutoModelForSequenceClassification",
        task=results["task"],
        name=title_of(record),
        start=record.get("start", "starts from"),
        model=results["model"],
        test_sentences=results["data"]["test"],
        precision=results["precision"],
        validation=_validation(record),
        details="\n".join([*activity, "- " + ", ".join(versions)]),
        options=json.dumps(results["options"], indent=1),
        test_accuracy=100 * record["test_accuracy"],
        **{key: record[key] for key in ("seed", "trainable_parameters", "total_parameters")},
    )


def _validation(record: dict) -> str:
    epoch = f"epoch {record['best_epoch']} of {record['settings']['epochs']}"
    if record["validation_accuracy"] is None:
        return f"{epoch}: nothing was picked"
    return f"validation accuracy {100 * record['validation_accuracy']:.2f} % ({epoch}, picked there)"


_CARD = """---
library_name: {library}
pipeline_tag: text-classification
---

# SpikeGPT on {task}: {name}, seed {seed}

- {start} ../../base/seed{seed} (model: {model})
- trained parameters: {trainable_parameters:,} of {total_parameters:,}
- test accuracy {test_accuracy:.2f} % on {test_sentences:,} sentences
- {validation}
- trained and tested in {precision}
{details}

```python
import spikegpt_lora
from {library} import {auto}
model = {auto}.from_pretrained("FOLDER")
```

Made by recipes/subj_finetune.py with these settings:

```json
{options}
```

Trained on English film sentences alone: not meant for other text. One seed says little; see results.md.
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
        "---\nlanguage: en\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [spikegpt, spiking]\n---",
        f"# SpikeGPT language model, {record['parameters'] / 1e6:.1f} M parameters",
        f"{config['n_layer']} layers, width {config['n_embd']}, {config['vocab_size']:,} tokens (lower-case BPE); "
        f"tau 2, threshold 1, reset to 0; its matrices read {read}; weights in bfloat16. Made by recipes/pretrain.py: "
        "settings and measures are in pretraining.json, the loss of every 50 steps is in loss.csv.",
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
