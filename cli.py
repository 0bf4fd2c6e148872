"""The door for a bare checkout: `python cli.py fit -c configs/quickstart.yaml`."""

from metasae_lightning.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
