"""A Python process that imports the package once and runs code in copies of itself: seconds less for each piece of code.

For code whose environment must be set before the imports, such as that of a Hub's client, which reads its endpoint when it is imported.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRELOADED = ["metasae_lightning.cli.lightning_cli", "metasae_lightning.cli.measure", "metasae_lightning.cli.publish"]


class PythonServer:
    """Starts the process with an environment; `run` is `python -c CODE ARGS` in a copy of it, one at a time."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        command = [sys.executable, __file__]
        environment = {**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> "PythonServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, code: str, *args: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the code with these arguments and additional environment variables; returns its exit status and what it printed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            job = [code, list(map(str, args)), str(cwd), variables, str(out), str(err)]
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            status = int(self._process.stdout.readline())
            return subprocess.CompletedProcess(["python", "-c", code, *job[1]], status, out.read_text(), err.read_text())


def serve() -> None:
    """Fork a copy for each line of standard input, and answer with its exit status."""
    for name in PRELOADED:
        __import__(name)
    for line in sys.stdin:
        if not (child := os.fork()):
            run_code(*json.loads(line))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, flush=True)


def run_code(code: str, args: list[str], cwd: str, variables: Mapping[str, str], out: str, err: str) -> None:
    """Run the code in this process and end it, as `python -c` would."""
    for path, descriptor in ((os.devnull, 0), (out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(variables)
    os.chdir(cwd)
    sys.argv = ["-c", *args]
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
