"""From a fine-tuned SpikeGPT to a checked neuromorphic bundle: `spikegpt_lora export`, from a checkout."""

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded: see "A busy machine" in README.md

from spikegpt_lora.commands.export import STOPPED, main
from spikegpt_lora.utils import command_line

if __name__ == "__main__":
    sys.exit(command_line.run(main, STOPPED))
