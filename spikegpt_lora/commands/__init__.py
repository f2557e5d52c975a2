"""What the command line `spikegpt_lora` does, a module a command; none is imported before it is called."""
