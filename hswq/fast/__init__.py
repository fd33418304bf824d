"""The command line: `python -m hswq.fast`."""
