"""Uploading to a hub that misbehaves, through the real client in a process of its own: as a script this file is that client."""

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
MADE = [".gitattributes", *NAMES]


def client() -> None:
    """Calls the client's API for every line of a name and arguments on stdin, and prints what it returned or raised."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import _http

    # No setting shortens the client's waits between its own tries, 23 s in all.
    _http.http_backoff.__kwdefaults__.update(base_wait_time=0.01, max_wait_time=0.01)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            if name == "from_pretrained":
                from sae_lens import SAE

                done = SAE.from_pretrained(arguments["release"], arguments["sae_id"]).save_model(arguments["into"])
            else:
                done = getattr(HfApi(), name)(**arguments)
            answer = {"done": done}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer, default=lambda value: getattr(value, "__dict__", str(value))), flush=True)


if __name__ == "__main__":
    client()
    sys.exit()


class Client:
    """A client's process, and a hub with a fresh repository for each test."""

    def __init__(self, hub: Hub, home: Path):
        self.hub, self.made = hub, 0
        environment = hub.environment(home, HF_TOKEN=TOKEN, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
        with (home / "stderr").open("w") as stderr:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": stderr}
            self.process = subprocess.Popen([sys.executable, __file__], env=environment, text=True, **pipes)

    def ask(self, name: str, *faults: Fault, **arguments: Any) -> dict[str, Any]:
        self.hub.faults[:] = faults
        self.hub.log.clear()
        assert self.process.stdin is not None and self.process.stdout is not None
        # A client that hangs is a failure, and not a test that hangs.
        killer = threading.Timer(240, self.process.kill)
        killer.start()
        self.process.stdin.write(json.dumps([name, arguments], default=str) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        killer.cancel()
        return json.loads(answer)

    def does(self, name: str, *faults: Fault, **arguments: Any) -> Any:
        answer = self.ask(name, *faults, **arguments)
        assert "error" not in answer, answer["error"]
        return answer["done"]

    def fails(self, name: str, *faults: Fault, **arguments: Any) -> str:
        return self.ask(name, *faults, **arguments)["error"]

    def uploads(self, **arguments: Any) -> str:
        """The commit of an upload, or the one that there is where nothing changed."""
        return self.does("upload_folder", **arguments).split("/commit/")[1]

    def repository(self, **arguments: Any) -> str:
        self.made += 1
        self.does("create_repo", repo_id=f"org/sae{self.made}", **arguments)
        return f"org/sae{self.made}"

    def state(self, name: str) -> tuple[list[str], str]:
        return sorted(self.does("list_repo_files", repo_id=name)), self.does("model_info", repo_id=name)["sha"]

    def sent(self) -> list[str]:
        """What the last call wrote, large objects by how their upload ended and the rest by what it was."""
        kinds = [(request.method, request.path.split("/")[-2], request.outcome) for request in self.hub.log]
        return [f"object {outcome}" if method == "PUT" else what for method, what, outcome in kinds if method == "PUT" or what == "commit"]


@pytest.fixture(scope="module")
def uploader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client that does not wait between its own tries."""
    place = tmp_path_factory.mktemp("writes")
    with Hub(place / "hub", token=TOKEN) as hub:
        client = Client(hub, place)
        yield client
        assert client.process.stdin is not None and client.process.stdout is not None
        client.process.stdin.close()
        client.process.wait(timeout=20)
        client.process.stdout.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return filled(tmp_path / "folder", seed=0)


def filled(folder: Path, seed: int) -> Path:
    """A card, a config, and weights of 2 MB and of 4 kB."""
    (folder / "layer").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "cfg.json").write_text(json.dumps({"seed": seed}))
    weights = numpy.random.default_rng(seed).random((1024, 512), dtype="float32")
    save_file({"W_dec": weights}, folder / "sae_weights.safetensors")
    save_file({"W_dec": weights[:2]}, folder / "layer" / "sae_weights.safetensors")
    return folder


def same(uploader: Client, name: str, folder: Path, **arguments: Any) -> bool:
    paths = {file: uploader.does("hf_hub_download", repo_id=name, filename=file, **arguments) for file in NAMES}
    return all(Path(path).read_bytes() == (folder / file).read_bytes() for file, path in paths.items())


def test_what_is_uploaded_comes_back(uploader: Client, folder: Path):
    name = uploader.repository(private=True, exist_ok=True)
    assert uploader.does("create_repo", repo_id=name, private=True, exist_ok=True).endswith(name)
    assert uploader.fails("create_repo", repo_id=name).startswith("HfHubHTTPError: Client error '409 Conflict'")
    done = uploader.uploads(repo_id=name, folder_path=folder)
    assert uploader.sent() == ["object answered", "object answered", "commit"]
    assert (sorted(uploader.does("list_repo_files", repo_id=name)), same(uploader, name, folder)) == (MADE, True)
    info = uploader.does("model_info", repo_id=name)
    assert (info["private"], info["sha"]) == (True, done)
    assert [sibling["rfilename"] for sibling in info["siblings"]] == MADE
    whole = Path(uploader.does("snapshot_download", repo_id=name))
    assert all((whole / file).read_bytes() == (folder / file).read_bytes() for file in NAMES)
    (weights,) = uploader.does("get_paths_info", repo_id=name, paths=[NAMES[-1]])
    assert weights["lfs"]["size"] == (folder / NAMES[-1]).stat().st_size


def test_what_is_there_is_not_sent_again(uploader: Client, folder: Path, tmp_path: Path):
    name = uploader.repository()
    first = uploader.uploads(repo_id=name, folder_path=folder)
    assert same(uploader, name, folder)
    again = uploader.uploads(repo_id=name, folder_path=folder)
    assert (uploader.sent(), again) == ([], first)
    # In another place it is another file, and the same object.
    uploader.does("upload_folder", repo_id=name, folder_path=folder, path_in_repo="copy")
    assert uploader.sent() == ["commit"]
    uploader.does("upload_folder", repo_id=name, folder_path=folder, path_in_repo="copy", allow_patterns="*.md", delete_patterns="*")
    assert uploader.state(name)[0] == [*MADE[:1], "README.md", *MADE[2:3], "copy/README.md", *MADE[3:]]
    # Of the same sizes, so that only the contents tell it from the first.
    other = filled(tmp_path / "other", seed=1)
    uploader.does("upload_folder", repo_id=name, folder_path=other)
    assert same(uploader, name, other)


@pytest.mark.parametrize("kind", ["error", "drop"])
@pytest.mark.parametrize(
    ("on", "after", "times", "tried", "later"),
    [
        ("upload", 0, 2 * TRIES, 2 * TRIES, ["object answered", "object answered", "commit"]),
        ("upload", 1, TRIES, 1 + TRIES, ["object answered", "commit"]),
        ("commit", 0, 1, 3, ["commit"]),
    ],
)
def test_what_breaks_leaves_the_repository_as_it_was(uploader, folder, tmp_path, kind, on, after, times, tried, later):
    name = uploader.repository()
    uploader.does("upload_folder", repo_id=name, folder_path=filled(tmp_path / "before", seed=1))
    before = uploader.state(name)
    error = uploader.fails("upload_folder", Fault(kind, on=on, after=after, times=times), repo_id=name, folder_path=folder)
    assert error.startswith(
        "RuntimeError: Error while uploading" if on == "upload" else ("HfHubHTTPError", "ReadError", "RemoteProtocolError")
    )
    assert (len(uploader.sent()), uploader.hub.faults[0].times) == (tried, 0)
    assert uploader.state(name) == before
    assert same(uploader, name, tmp_path / "before")
    uploader.does("upload_folder", repo_id=name, folder_path=folder)
    assert sorted(uploader.sent()) == sorted(later)
    assert same(uploader, name, folder)


@pytest.mark.parametrize("kind", ["error", "drop"])
def test_an_upload_that_heals_is_the_clients_own_business(uploader: Client, folder: Path, kind: Any):
    name = uploader.repository()
    uploader.does("upload_folder", Fault(kind, on="upload", times=2), repo_id=name, folder_path=folder)
    assert uploader.sent().count(f"object {kind}") == 2
    assert same(uploader, name, folder)


def test_whoever_has_no_right_is_refused(uploader: Client, folder: Path, tmp_path: Path):
    public, private = uploader.repository(), uploader.repository(private=True)
    before = uploader.state(private)
    for token, line in [("hf_test_wrong", "HfHubHTTPError: Client error '401"), (False, "RepositoryNotFoundError: 401 ")]:
        assert "'401 Unauthorized'" in uploader.fails("create_repo", repo_id="org/other", token=token, exist_ok=True)
        for name in (public, private):
            assert uploader.fails("upload_folder", repo_id=name, folder_path=folder, token=token).startswith(line)
            assert uploader.fails("create_branch", repo_id=name, branch="trial", token=token).startswith(line)
    assert uploader.fails("hf_hub_download", repo_id=private, filename=".gitattributes", token=False).startswith("RepositoryNotFoundError")
    assert (uploader.does("whoami")["name"], uploader.fails("whoami", token="hf_test_wrong")) == (
        USER,
        "HfHubHTTPError: Invalid user token.",
    )
    assert TOKEN not in str(uploader.hub.log) and uploader.state(private) == before
    with Hub(uploader.hub.folder) as hub:
        reader = Client(hub, tmp_path)
        assert "403 Forbidden" in reader.fails("upload_folder", repo_id=public, folder_path=folder)
        assert reader.state(public)[0] == [".gitattributes"]
        reader.process.communicate(timeout=20)


def test_a_branch_is_beside_main(uploader: Client, folder: Path, tmp_path: Path):
    name, other = uploader.repository(), filled(tmp_path / "other", seed=1)
    uploader.does("upload_folder", repo_id=name, folder_path=folder)
    assert "Revision Not Found" in uploader.fails("upload_folder", repo_id=name, folder_path=other, revision="trial")
    uploader.does("create_branch", repo_id=name, branch="trial")
    assert "409 Conflict" in uploader.fails("create_branch", repo_id=name, branch="trial")
    assert uploader.does("model_info", repo_id=name, revision="trial")["sha"] == uploader.state(name)[1]
    done = uploader.uploads(repo_id=name, folder_path=other, revision="trial")
    assert same(uploader, name, folder)
    assert same(uploader, name, other, revision="trial") and same(uploader, name, other, revision=done)
    assert sorted(uploader.does("list_repo_files", repo_id=name, revision="trial")) == uploader.state(name)[0] == MADE
    assert {path.name for path in (uploader.hub.folder / "models" / name).iterdir()} == {Path(made).parts[0] for made in MADE}


def test_a_card_is_checked_before_anything_is_sent(uploader: Client, folder: Path):
    name = uploader.repository()
    (folder / "README.md").write_text("---\ntags: [sae\n---\n")
    assert uploader.fails("upload_folder", repo_id=name, folder_path=folder).startswith("ValueError: Invalid metadata in README.md")
    assert uploader.sent() == []


def test_one_refused_line_refuses_the_commit(uploader: Client):
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
    # An object has a place once a batch gave it one, and nothing but what it is called after goes there.
    place = f"/{name}.git/info/lfs/objects/{'0' * 64}"
    assert status("PUT", place, "other") == 403
    assert status("POST", f"/{name}.git/info/lfs/objects/batch", {"objects": [{"oid": "0" * 64, "size": 7}]}) == 200
    assert status("PUT", place, "other") == 400
    assert uploader.state(name) == before
    assert status("POST", commit, header, file) == 200
    connection.close()
    assert uploader.state(name)[0] == [".gitattributes", "a/b.txt"]


def test_saelens_loads_what_was_uploaded(uploader: Client, tmp_path: Path):
    from tests.helpers.judged import sae

    name = uploader.repository(private=True)
    sae(3).save_model(tmp_path / "made")
    uploader.does("upload_folder", repo_id=name, folder_path=tmp_path / "made", path_in_repo="layer/width_x")
    uploader.does("from_pretrained", release=name, sae_id="layer/width_x", into=tmp_path / "loaded")
    made, loaded = (load_file(tmp_path / place / "sae_weights.safetensors") for place in ("made", "loaded"))
    assert made.keys() == loaded.keys()
    assert all((made[weight] == loaded[weight]).all() for weight in made)
