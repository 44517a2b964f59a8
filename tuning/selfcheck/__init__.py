"""What a chip does on first contact, beside what was predicted: `python -m tuning.selfcheck --help`."""
