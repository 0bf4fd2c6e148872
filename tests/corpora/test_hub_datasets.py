"""Streaming from a local Hub server that fails on request. The client runs in a process of its own: this file, as a script."""

import json
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.helpers.hub import Fault, Hub

ROOT = Path(__file__).parents[2]
READ_SECONDS = 1
# Four shards of 30 documents; a shard is so small that the client reads it in one request.
SHARDS = {f"data/train-{shard}-of-4": [f"shard {shard} text {i}" for i in range(30)] for shard in range(4)}
TEXTS = sorted(text for texts in SHARDS.values() for text in texts)
# The hub's client tries a request six times before it gives up.
TRIES = 6


def client(keep_waits: bool) -> None:
    """For each line of JSON on stdin, read a corpus; print its documents, the log lines, the error and the reader's state as JSON.

    Args:
        keep_waits: Whether the Hub's client keeps the waits between its own tries.
    """
    from huggingface_hub.utils import _http

    from metasae_lightning.corpora import HubText
    from metasae_lightning.errors import InputError

    if not keep_waits:
        # No setting shortens the client's waits between its own tries, 23 s together.
        for function in (_http.http_backoff, _http.http_stream_backoff.__wrapped__):
            function.__kwdefaults__.update(base_wait_time=0.01, max_wait_time=0.01)
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("metasae_lightning").addHandler(handler)
    for line in sys.stdin:
        job: dict[str, Any] = json.loads(line)
        texts, error, start = [], "", time.monotonic()
        warnings.clear()
        reader = HubText(**job["corpus"]).reader(state=job["state"])
        try:
            texts.extend(islice(reader, job["take"]))
        except InputError as caught:
            error = str(caught)
        answer = {"texts": texts, "error": error, "warnings": warnings, "state": reader.state(), "seconds": time.monotonic() - start}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    client(keep_waits="--keep-waits" in sys.argv)
    sys.exit()


class Client:
    """A client's process and its Hub. Each test reads a dataset of its own, because the client caches answers about a dataset."""

    def __init__(self, hub: Hub, home: Path, *arguments: str):
        variables = {
            "HF_HUB_DOWNLOAD_TIMEOUT": str(READ_SECONDS),
            "HF_HUB_ETAG_TIMEOUT": str(READ_SECONDS),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        self.hub, self.n_datasets = hub, 0
        environment, command = hub.environment(home, **variables), [sys.executable, __file__, *arguments]
        with (home / "stderr").open("w") as stderr:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": stderr}
            self.process = subprocess.Popen(command, env=environment, text=True, **pipes)

    def dataset(self, kind: str) -> str:
        """Add a dataset to the Hub; returns its name."""
        self.n_datasets += 1
        for name, texts in SHARDS.items():
            file = self.hub.folder / "datasets" / "org" / f"set{self.n_datasets}" / f"{name}.{kind}"
            file.parent.mkdir(parents=True, exist_ok=True)
            if kind == "parquet":
                pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file, row_group_size=10)
            else:
                file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        return f"org/set{self.n_datasets}"

    def read(self, path: str, *faults: Fault, state: Any = None, take: int = 1000, **corpus: Any) -> dict[str, Any]:
        """Let the client read at most `take` documents while the Hub has these faults; returns the client's answer."""
        self.hub.faults[:] = faults
        self.hub.log.clear()
        assert self.process.stdin is not None and self.process.stdout is not None
        job = {"corpus": {"path": path, "shuffle_window": 25, "retry_seconds": 0.05, **corpus}, "state": state, "take": take}
        # If the client hangs, the test fails instead of hanging too.
        killer = threading.Timer(120, self.process.kill)
        killer.start()
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        killer.cancel()
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=20)
        self.process.stdout.close()


def run_hub_and_client(folder: Path, *arguments: str) -> Iterator[Client]:
    """A running Hub and client, for a fixture."""
    with Hub(folder) as hub:
        client = Client(hub, folder, *arguments)
        yield client
        client.close()


@pytest.fixture(scope="module")
def client_without_waits(tmp_path_factory) -> Iterator[Client]:
    """A client that does not wait between its own tries."""
    yield from run_hub_and_client(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def texts_without_faults(client_without_waits) -> dict[str, list[str]]:
    """The documents in the order in which they are read without faults, by file format."""
    return {kind: client_without_waits.read(client_without_waits.dataset(kind))["texts"] for kind in ("parquet", "jsonl")}


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_hub_without_faults_yields_every_document_once(client_without_waits, texts_without_faults, kind):
    assert sorted(texts_without_faults[kind]) == TEXTS
    assert texts_without_faults[kind] != TEXTS
    read = client_without_waits.read(client_without_waits.dataset(kind))
    # The order does not depend on the dataset's name.
    assert (read["texts"], read["warnings"], read["error"]) == (texts_without_faults[kind], [], "")


# The client itself tries six times, so it hides two faults. Seven faults need one retry of ours, thirteen need two.
# The first request for data reads the columns, so three good requests are two shards.
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("fault", "times", "retried"), [("error", 2, 0), ("error", 7, 1), ("error", 13, 2), ("drop", 2, 0), ("drop", 7, 1)]
)
def test_after_a_passing_fault_no_document_is_lost_or_repeated(client_without_waits, texts_without_faults, kind, fault, times, retried):
    path = client_without_waits.dataset(kind)
    read = client_without_waits.read(path, Fault(fault, times=times, after=3))
    assert (read["texts"], read["error"]) == (texts_without_faults[kind], "")
    message = {"error": "HfHubHTTPError: Server error '500 ", "drop": "RemoteProtocolError: peer closed connection"}[fault]
    assert [line.split(message)[0] for line in read["warnings"]] == [
        f"the dataset {path!r} broke off after 60 documents, retry {retry} of 3 in {0.05 * 2 ** (retry - 1):g} s: "
        for retry in range(1, retried + 1)
    ]


def test_the_count_of_retries_starts_again_after_each_success(client_without_waits, texts_without_faults):
    faults = [Fault("error", times=TRIES, after=good) for good in (2, 1, 1)]
    read = client_without_waits.read(client_without_waits.dataset("parquet"), *faults, retries=1)
    assert (read["texts"], read["error"], len(read["warnings"])) == (texts_without_faults["parquet"], "", 3)


def test_a_stalled_read_times_out_and_is_retried(client_without_waits, texts_without_faults):
    read = client_without_waits.read(client_without_waits.dataset("parquet"), Fault("stall", times=TRIES, after=3))
    assert (read["texts"], read["error"]) == (texts_without_faults["parquet"], "")
    (line,) = read["warnings"]
    assert "broke off after 60 documents, retry 1 of 3" in line and "timed out" in line
    assert read["seconds"] > TRIES * READ_SECONDS


# The requests before the first data: the dataset's name, its files and the files that may describe it. The client does not repeat
# them by itself; `after` is the number of good requests before the fault.
@pytest.mark.parametrize("after", range(8))
@pytest.mark.parametrize("fault", ["error", "drop"])
def test_a_fault_while_opening_a_dataset_is_retried(client_without_waits, texts_without_faults, fault, after):
    read = client_without_waits.read(client_without_waits.dataset("parquet"), Fault(fault, times=1, after=after, on="api"))
    assert (read["texts"], read["error"]) == (texts_without_faults["parquet"], "")
    assert len(read["warnings"]) <= 1
    assert fault in {request.outcome for request in client_without_waits.hub.log}


@pytest.mark.parametrize("on", ["data", "api"])
@pytest.mark.parametrize("fault", ["error", "drop"])
def test_a_lasting_fault_is_an_error_of_one_line_in_bounded_time(client_without_waits, fault, on):
    path = client_without_waits.dataset("jsonl")
    read = client_without_waits.read(path, Fault(fault, after=3 if on == "data" else 0, on=on), retries=2)
    documents = 60 if on == "data" else 0
    assert len(read["warnings"]) == 2
    assert read["error"].startswith(f"path: the dataset {path!r} cannot be read, after {documents} documents and 2 retries: ")
    assert ("500" if fault == "error" else "RemoteProtocolError") in read["error"]
    assert "\n" not in read["error"]
    # A window is yielded when it is full, so the last ten of the sixty documents are not yielded.
    assert len(read["texts"]) == documents // 25 * 25
    assert read["seconds"] < 10


def test_reading_resumes_after_an_error(client_without_waits, texts_without_faults):
    path = client_without_waits.dataset("parquet")
    broken = client_without_waits.read(path, Fault("error", after=3), retries=0)
    resumed = client_without_waits.read(path, state=broken["state"])
    assert broken["texts"] + resumed["texts"] == texts_without_faults["parquet"]
    assert "50 documents" not in broken["error"] and "after 60 documents and 0 retries" in broken["error"]


# With windows of 25, document 90 is in a window that begins at 75, in the third shard: two shards are finished. With windows of 30,
# each window is a shard, and document 90 begins the fourth: three are finished.
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize(("window", "n_finished"), [(25, 2), (30, 3)])
def test_resuming_does_not_request_finished_shards(client_without_waits, kind, window, n_finished):
    path = client_without_waits.dataset(kind)
    all_texts = client_without_waits.read(path, shuffle_window=window)["texts"]
    # The first request reads the columns, from the first file by name.
    order = client_without_waits.hub.downloads()[1:]
    first = client_without_waits.read(path, take=90, shuffle_window=window)
    resumed = client_without_waits.read(path, state=first["state"], shuffle_window=window)
    assert first["texts"] + resumed["texts"] == all_texts
    assert len(set(order)) == 4
    assert client_without_waits.hub.downloads() == [f"data/train-0-of-4.{kind}", *order[n_finished:]]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_errors_that_no_retry_cures_are_not_retried(client_without_waits, status):
    read = client_without_waits.read(client_without_waits.dataset("parquet"), Fault("error", after=3, status=status))
    assert (read["warnings"], len(client_without_waits.hub.downloads("error"))) == ([], 1)
    assert "cannot be read, after 60 documents: " in read["error"] and str(status) in read["error"]


def test_a_missing_dataset_revision_or_column_is_an_error_of_one_line_and_not_retried(client_without_waits):
    path = client_without_waits.dataset("parquet")
    for corpus, message in [
        ({"path": "org/none"}, "path: the dataset 'org/none' cannot be read: .*doesn't exist on the Hub"),
        ({"path": path, "revision": "none"}, f"path: the dataset {path!r} cannot be read: .*Revision 'none' doesn't exist"),
        ({"path": path, "column": "txet"}, f"column: {path} has no 'txet', it has text"),
    ]:
        read = client_without_waits.read(**corpus)
        assert read["error"].count("\n") == 0
        assert read["warnings"] == [] and re.search(message, read["error"])


@pytest.mark.slow
def test_with_the_clients_own_waits_the_error_is_raised_in_bounded_time(tmp_path):
    for client in run_hub_and_client(tmp_path, "--keep-waits"):
        read = client.read(client.dataset("parquet"), Fault("error", after=3), retries=1)
        assert "after 60 documents and 1 retries" in read["error"]
        # Two rounds of the client's six tries, with waits of 1 + 2 + 4 + 8 + 8 s between them.
        assert 46 < read["seconds"] < 80
        assert len(client.hub.downloads("error")) == 2 * TRIES
