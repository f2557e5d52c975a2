"""Write text with a SpikeGPT language model: `spikegpt_lora generate`, from a checkout."""

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded: see "A busy machine" in README.md

from spikegpt_lora.commands.generate import main
from spikegpt_lora.utils import command_line

if __name__ == "__main__":
    sys.exit(command_line.run(main))
