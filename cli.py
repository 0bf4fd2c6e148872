"""The command line of a checkout that is not installed: `python cli.py fit -c quickstart`."""

from metasae_lightning.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
