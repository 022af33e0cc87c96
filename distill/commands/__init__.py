"""What the command line does: one module for each command. `scripts/NAME.py` launches `distill.commands.NAME`."""
