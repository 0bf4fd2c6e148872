"""The command line in processes of its own, forked from one that has imported everything: seconds less for each.

Ranks are started as torchrun starts them, by the environment. What a process prints goes to files.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# What the server imports once; every process is a copy of it.
PRELOADED = ["metasae_lightning.cli.lightning_cli", "metasae_lightning.cli.measure", "metasae_lightning.cli.publish"]


def forkserver() -> Any:
    """The multiprocessing context whose processes are copies of one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, "tests.helpers.killed", "tests.helpers.ranks"])
    return context


def devices_of(words: Sequence[str]) -> int:
    """The number behind `--trainer.devices`, or 1."""
    return int(words[words.index("--trainer.devices") + 1]) if "--trainer.devices" in words else 1


class CommandLine:
    """`metasae WORDS` on as many ranks as it asks for; rank 0 stands for the command, as with a launcher.

    Args:
        words: The words behind `metasae`.
        cwd: The folder that it runs in.
        environment: Variables over this process's own.
    """

    def __init__(self, words: Sequence[str], *, cwd: Path, environment: Mapping[str, str] | None = None) -> None:
        ranks = devices_of(words)
        folder = Path(tempfile.mkdtemp())
        self.out, self.err = folder / "out", folder / "err"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {**os.environ, **(environment or {})}
        self._processes: list[Any] = []
        for rank in range(ranks):
            launched = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            launched |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            target = (list(words), {**shared, **(launched if ranks > 1 else {})}, str(cwd), str(self.out), str(self.err))
            process = forkserver().Process(target=_run, args=target)
            process.start()
            self._processes.append(process)
        self.pid: int = self._processes[0].pid

    @property
    def returncode(self) -> int | None:
        """Exit status of rank 0; negative where a signal ended it, none while it runs."""
        return self._processes[0].exitcode

    def poll(self) -> int | None:
        """The same, as subprocess has it."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to rank 0."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill all ranks."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for all ranks; what they printed on stdout and on stderr."""
        deadline = time.monotonic() + timeout
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                self.kill()
                raise TimeoutError(f"still running after {timeout} s: {self.err.read_text()[-3000:]}")
        printed = self.out.read_text(), self.err.read_text()
        shutil.rmtree(self.out.parent)
        return printed


def _run(words: list[str], environment: dict[str, str], folder: str, out: str, err: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    from metasae_lightning.cli import main

    torch.set_num_threads(1)  # products are then summed in one order whatever else the machine does
    sys.argv = ["metasae", *words]
    status = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
