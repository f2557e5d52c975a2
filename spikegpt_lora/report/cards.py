"""The README.md of a fine-tuned model or adapter, in the hub's format."""

import json

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
