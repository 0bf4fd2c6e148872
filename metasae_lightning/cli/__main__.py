"""The command line as `python -m metasae_lightning.cli`."""

from metasae_lightning.cli.entry import main

if __name__ == "__main__":
    raise SystemExit(main())
