"""Uploads by the real client to a test hub that fails on demand. The client is a process of its own: this file run as a script."""

import http.client
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers.hub import USER, Fault, Hub

ROOT = Path(__file__).parents[2]
TOKEN = "hf_test_may_write"
# The client tries a request six times before it gives up, but creates and commits only once.
TRIES = 6
CARD = "---\nlibrary_name: saelens\n---\n# An SAE\n"
NAMES = ["README.md", "cfg.json", "layer/sae_weights.safetensors", "sae_weights.safetensors"]
ALL_FILES = [".gitattributes", *NAMES]


def client() -> None:
    """Call the client's API for each line of stdin, a method name and its arguments, and print the result or the error."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import _http

    # No setting shortens the client's waits between its own tries, 23 s in all.
    _http.http_backoff.__kwdefaults__.update(base_wait_time=0.01, max_wait_time=0.01)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            if name == "from_pretrained":
                from sae_lens import SAE

                result = SAE.from_pretrained(arguments["release"], arguments["sae_id"]).save_model(arguments["into"])
            else:
                result = getattr(HfApi(), name)(**arguments)
            answer = {"result": result}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer, default=lambda value: getattr(value, "__dict__", str(value))), flush=True)


if __name__ == "__main__":
    client()
    sys.exit()


class Client:
    """A client process and its hub; each test makes a new repository."""

    def __init__(self, hub: Hub, home: Path):
        self.hub, self.n_repositories = hub, 0
        environment = hub.environment(home, HF_TOKEN=TOKEN, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
        with (home / "stderr").open("w") as stderr:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": stderr}
            self.process = subprocess.Popen([sys.executable, __file__], env=environment, text=True, **pipes)

    def ask(self, name: str, *faults: Fault, **arguments: Any) -> dict[str, Any]:
        """Call a method of the client's API while the hub has these faults."""
        self.hub.faults[:] = faults
        self.hub.log.clear()
        assert self.process.stdin is not None and self.process.stdout is not None
        # A client that hangs fails the test instead of blocking it.
        killer = threading.Timer(240, self.process.kill)
        killer.start()
        self.process.stdin.write(json.dumps([name, arguments], default=str) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        killer.cancel()
        return json.loads(answer)

    def succeed(self, name: str, *faults: Fault, **arguments: Any) -> Any:
        answer = self.ask(name, *faults, **arguments)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def fail(self, name: str, *faults: Fault, **arguments: Any) -> str:
        return self.ask(name, *faults, **arguments)["error"]

    def upload(self, **arguments: Any) -> str:
        """Upload a folder; returns the new commit, or the current one if nothing changed."""
        return self.succeed("upload_folder", **arguments).split("/commit/")[1]

    def repository(self, **arguments: Any) -> str:
        """The name of a new repository."""
        self.n_repositories += 1
        self.succeed("create_repo", repo_id=f"org/sae{self.n_repositories}", **arguments)
        return f"org/sae{self.n_repositories}"

    def state(self, name: str) -> tuple[list[str], str]:
        """The files of a repository and its commit."""
        return sorted(self.succeed("list_repo_files", repo_id=name)), self.succeed("model_info", repo_id=name)["sha"]

    def writes(self) -> list[str]:
        """The writes of the last call: `commit`, or `object` and how the upload of the large object ended."""
        kinds = [(request.method, request.path.split("/")[-2], request.outcome) for request in self.hub.log]
        return [
            f"object {outcome}" if method == "PUT" else action for method, action, outcome in kinds if method == "PUT" or action == "commit"
        ]


@pytest.fixture(scope="module")
def uploader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client that does not wait between its own tries."""
    root = tmp_path_factory.mktemp("writes")
    with Hub(root / "hub", token=TOKEN) as hub:
        client = Client(hub, root)
        yield client
        assert client.process.stdin is not None and client.process.stdout is not None
        client.process.stdin.close()
        client.process.wait(timeout=20)
        client.process.stdout.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_sae_folder(tmp_path / "folder", seed=0)


def write_sae_folder(folder: Path, seed: int) -> Path:
    """A card, a config, and weights of 2 MB and of 4 kB."""
    (folder / "layer").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "cfg.json").write_text(json.dumps({"seed": seed}))
    weights = numpy.random.default_rng(seed).random((1024, 512), dtype="float32")
    save_file({"W_dec": weights}, folder / "sae_weights.safetensors")
    save_file({"W_dec": weights[:2]}, folder / "layer" / "sae_weights.safetensors")
    return folder


def has_files_of(uploader: Client, name: str, folder: Path, **arguments: Any) -> bool:
    """Whether downloads from the repository are bit-equal to the folder's files."""
    paths = {file: uploader.succeed("hf_hub_download", repo_id=name, filename=file, **arguments) for file in NAMES}
    return all(Path(path).read_bytes() == (folder / file).read_bytes() for file, path in paths.items())


def test_uploaded_files_download_bit_equal(uploader: Client, folder: Path):
    name = uploader.repository(private=True, exist_ok=True)
    assert uploader.succeed("create_repo", repo_id=name, private=True, exist_ok=True).endswith(name)
    assert uploader.fail("create_repo", repo_id=name).startswith("HfHubHTTPError: Client error '409 Conflict'")
    commit = uploader.upload(repo_id=name, folder_path=folder)
    assert uploader.writes() == ["object answered", "object answered", "commit"]
    assert (sorted(uploader.succeed("list_repo_files", repo_id=name)), has_files_of(uploader, name, folder)) == (ALL_FILES, True)
    info = uploader.succeed("model_info", repo_id=name)
    assert (info["private"], info["sha"]) == (True, commit)
    assert [sibling["rfilename"] for sibling in info["siblings"]] == ALL_FILES
    snapshot = Path(uploader.succeed("snapshot_download", repo_id=name))
    assert all((snapshot / file).read_bytes() == (folder / file).read_bytes() for file in NAMES)
    (weights,) = uploader.succeed("get_paths_info", repo_id=name, paths=[NAMES[-1]])
    assert weights["lfs"]["size"] == (folder / NAMES[-1]).stat().st_size


def test_files_already_in_the_repository_are_not_uploaded_again(uploader: Client, folder: Path, tmp_path: Path):
    name = uploader.repository()
    first_commit = uploader.upload(repo_id=name, folder_path=folder)
    assert has_files_of(uploader, name, folder)
    second_commit = uploader.upload(repo_id=name, folder_path=folder)
    assert (uploader.writes(), second_commit) == ([], first_commit)
    # At another path the file is new, but its object is already stored.
    uploader.succeed("upload_folder", repo_id=name, folder_path=folder, path_in_repo="copy")
    assert uploader.writes() == ["commit"]
    uploader.succeed("upload_folder", repo_id=name, folder_path=folder, path_in_repo="copy", allow_patterns="*.md", delete_patterns="*")
    assert uploader.state(name)[0] == [*ALL_FILES[:1], "README.md", *ALL_FILES[2:3], "copy/README.md", *ALL_FILES[3:]]
    # The other folder's files have the same sizes, and differ in content only.
    other = write_sae_folder(tmp_path / "other", seed=1)
    uploader.succeed("upload_folder", repo_id=name, folder_path=other)
    assert has_files_of(uploader, name, other)


@pytest.mark.parametrize("kind", ["error", "drop"])
@pytest.mark.parametrize(
    ("on", "after", "times", "tried", "later"),
    [
        ("upload", 0, 2 * TRIES, 2 * TRIES, ["object answered", "object answered", "commit"]),
        ("upload", 1, TRIES, 1 + TRIES, ["object answered", "commit"]),
        ("commit", 0, 1, 3, ["commit"]),
    ],
)
def test_a_failed_upload_leaves_the_repository_unchanged(uploader, folder, tmp_path, kind, on, after, times, tried, later):
    name = uploader.repository()
    uploader.succeed("upload_folder", repo_id=name, folder_path=write_sae_folder(tmp_path / "before", seed=1))
    before = uploader.state(name)
    error = uploader.fail("upload_folder", Fault(kind, on=on, after=after, times=times), repo_id=name, folder_path=folder)
    assert error.startswith(
        "RuntimeError: Error while uploading" if on == "upload" else ("HfHubHTTPError", "ReadError", "RemoteProtocolError")
    )
    assert (len(uploader.writes()), uploader.hub.faults[0].times) == (tried, 0)
    assert uploader.state(name) == before
    assert has_files_of(uploader, name, tmp_path / "before")
    uploader.succeed("upload_folder", repo_id=name, folder_path=folder)
    assert sorted(uploader.writes()) == sorted(later)
    assert has_files_of(uploader, name, folder)


@pytest.mark.parametrize("kind", ["error", "drop"])
def test_the_client_retries_a_failed_upload_by_itself(uploader: Client, folder: Path, kind: Any):
    name = uploader.repository()
    uploader.succeed("upload_folder", Fault(kind, on="upload", times=2), repo_id=name, folder_path=folder)
    assert uploader.writes().count(f"object {kind}") == 2
    assert has_files_of(uploader, name, folder)


def test_clients_without_the_token_are_refused(uploader: Client, folder: Path, tmp_path: Path):
    public, private = uploader.repository(), uploader.repository(private=True)
    before = uploader.state(private)
    for token, message in [("hf_test_wrong", "HfHubHTTPError: Client error '401"), (False, "RepositoryNotFoundError: 401 ")]:
        assert "'401 Unauthorized'" in uploader.fail("create_repo", repo_id="org/other", token=token, exist_ok=True)
        for name in (public, private):
            assert uploader.fail("upload_folder", repo_id=name, folder_path=folder, token=token).startswith(message)
            assert uploader.fail("create_branch", repo_id=name, branch="trial", token=token).startswith(message)
    assert uploader.fail("hf_hub_download", repo_id=private, filename=".gitattributes", token=False).startswith("RepositoryNotFoundError")
    assert (uploader.succeed("whoami")["name"], uploader.fail("whoami", token="hf_test_wrong")) == (
        USER,
        "HfHubHTTPError: Invalid user token.",
    )
    assert TOKEN not in str(uploader.hub.log) and uploader.state(private) == before
    with Hub(uploader.hub.folder) as hub:
        reader = Client(hub, tmp_path)
        assert "403 Forbidden" in reader.fail("upload_folder", repo_id=public, folder_path=folder)
        assert reader.state(public)[0] == [".gitattributes"]
        reader.process.communicate(timeout=20)


def test_a_branch_and_main_do_not_change_each_other(uploader: Client, folder: Path, tmp_path: Path):
    name, other = uploader.repository(), write_sae_folder(tmp_path / "other", seed=1)
    uploader.succeed("upload_folder", repo_id=name, folder_path=folder)
    assert "Revision Not Found" in uploader.fail("upload_folder", repo_id=name, folder_path=other, revision="trial")
    uploader.succeed("create_branch", repo_id=name, branch="trial")
    assert "409 Conflict" in uploader.fail("create_branch", repo_id=name, branch="trial")
    assert uploader.succeed("model_info", repo_id=name, revision="trial")["sha"] == uploader.state(name)[1]
    commit = uploader.upload(repo_id=name, folder_path=other, revision="trial")
    assert has_files_of(uploader, name, folder)
    assert has_files_of(uploader, name, other, revision="trial") and has_files_of(uploader, name, other, revision=commit)
    assert sorted(uploader.succeed("list_repo_files", repo_id=name, revision="trial")) == uploader.state(name)[0] == ALL_FILES
    assert {path.name for path in (uploader.hub.folder / "models" / name).iterdir()} == {Path(file).parts[0] for file in ALL_FILES}


def test_an_invalid_card_is_refused_before_any_upload(uploader: Client, folder: Path):
    name = uploader.repository()
    (folder / "README.md").write_text("---\ntags: [sae\n---\n")
    assert uploader.fail("upload_folder", repo_id=name, folder_path=folder).startswith("ValueError: Invalid metadata in README.md")
    assert uploader.writes() == []


def test_a_commit_with_one_invalid_operation_changes_nothing(uploader: Client):
    name = uploader.repository()
    before = uploader.state(name)
    header, file = {"key": "header", "value": {"summary": ""}}, {"key": "file", "value": {"path": "a/b.txt", "content": "YQ=="}}
    refused = [
        (404, {"key": "deletedFile", "value": {"path": "none"}}),
        (400, {"key": "lfsFile", "value": {"path": "w.safetensors", "oid": "0" * 64}}),
        (400, {"key": "file", "value": {"path": "../out", "content": ""}}),
        (412, {"key": "header", "value": {"parentCommit": "0" * 40}}),
    ]
    connection = http.client.HTTPConnection("127.0.0.1", uploader.hub.server_port)
    commit, headers = f"/api/models/{name}/commit/main", {"Authorization": f"Bearer {TOKEN}"}

    def status(method: str, path: str, *lines: Any) -> int:
        connection.request(method, path, "\n".join(json.dumps(line) for line in lines), headers)
        with connection.getresponse() as response:
            response.read()
            return response.status

    assert [status("POST", commit, header, file, line) for _, line in refused] == [expected for expected, _ in refused]
    # An object can be uploaded only after a batch request named it, and only with the content of its hash.
    object_path = f"/{name}.git/info/lfs/objects/{'0' * 64}"
    assert status("PUT", object_path, "other") == 403
    assert status("POST", f"/{name}.git/info/lfs/objects/batch", {"objects": [{"oid": "0" * 64, "size": 7}]}) == 200
    assert status("PUT", object_path, "other") == 400
    assert uploader.state(name) == before
    assert status("POST", commit, header, file) == 200
    connection.close()
    assert uploader.state(name)[0] == [".gitattributes", "a/b.txt"]


def test_saelens_loads_an_uploaded_sae(uploader: Client, tmp_path: Path):
    from tests.helpers.judged import sae

    name = uploader.repository(private=True)
    sae(3).save_model(tmp_path / "made")
    uploader.succeed("upload_folder", repo_id=name, folder_path=tmp_path / "made", path_in_repo="layer/width_x")
    uploader.succeed("from_pretrained", release=name, sae_id="layer/width_x", into=tmp_path / "loaded")
    uploaded, loaded = (load_file(tmp_path / folder_name / "sae_weights.safetensors") for folder_name in ("made", "loaded"))
    assert uploaded.keys() == loaded.keys()
    assert all((uploaded[weight] == loaded[weight]).all() for weight in uploaded)
