"""`metasae publish`: others load the same SAE, the page has the measurements, and a failure leaves nothing half written."""

import json
import shutil
import subprocess
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from sae_lens import SAE
from safetensors.torch import load_file, save_file

from metasae_lightning.cli import main
from metasae_lightning.errors import InputError
from metasae_lightning.redaction import redact
from metasae_lightning.report import model_card
from metasae_lightning.sae import pretrained
from metasae_lightning.sae.publish import open_destination
from metasae_lightning.sae.publish import publish as publish_folders
from tests.helpers.hub import Fault, Hub
from tests.helpers.judged import HOOK, sae, write_run
from tests.helpers.python_server import PythonServer

ROOT = Path(__file__).parents[2]
TOKEN = "hf_testtokenwhichissecret"
FILES = {"cfg.json", "metasae.json", "sae_weights.safetensors", "sparsity.safetensors"}
QUICK = ["--tokens", "256"]


def write_finished_run(folder: Path, name: str = "one", *, seed: int = 0) -> Path:
    """A finished run with a meta SAE and a full recipe; the recipe and the metadata contain a token."""
    metadata = {"dataset_path": "some text", "training_architecture": "batchtopk", "exclude_special_tokens": True, "context_size": 16}
    run_folder = write_run(folder, name, seed=seed, model_from_pretrained_kwargs={"token": TOKEN}, **metadata)
    sae(1, 8, 0.1).save_model(run_folder / "saes" / "meta")
    tree = yaml.safe_load((run_folder / "config.yaml").read_text())
    primary = {"class_path": "sae_lens.BatchTopKTrainingSAEConfig", "init_args": {"d_in": 32, "d_sae": 48, "k": 8}}
    meta = {"class_path": "sae_lens.BatchTopKTrainingSAEConfig", "init_args": {"d_in": 32, "d_sae": 8, "k": 2}}
    penalties = {"decomposability": {"class_path": "Decomposability", "init_args": {"weight": 0.3, "sigma_sq": 1.0}}}
    tree["model"] = {"class_path": "metasae_lightning.JointSAE", "init_args": {"primary": primary, "meta": meta, "penalties": penalties}}
    tree["data"]["init_args"]["language_model"]["init_args"]["model_kwargs"] = {"token": TOKEN}
    (run_folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return run_folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_finished_run(tmp_path)


def publish(*args: str | Path, rc: int = 0) -> None:
    assert main(["publish", *map(str, args), *QUICK]) == rc


def publish_error(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    """The one error line of a `metasae publish` that fails."""
    assert main(["publish", *map(str, args), *([] if "--tokens" in args else QUICK)]) == 2
    lines = [line for line in capsys.readouterr().err.split("\n") if line.startswith("metasae: error: ")]
    assert len(lines) == 1
    return lines[0]


def tree(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder, by path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_published_folder_has_both_saes_the_record_and_the_page(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    publish(place, "out")
    output = capsys.readouterr()
    names = {f"{HOOK}/{name}" for name in FILES} | {f"{HOOK}-meta/cfg.json", f"{HOOK}-meta/sae_weights.safetensors", "README.md"}
    assert set(tree(tmp_path / "out")) == names
    published, exported = SAE.load_from_disk(tmp_path / "out" / HOOK), pretrained.load_pretrained(place / "saes" / "primary")
    x = torch.randn(64, 32)
    assert torch.equal(published.encode(x), exported.encode(x)) and torch.equal(published(x), exported(x))
    assert load_file(tmp_path / "out" / f"{HOOK}-meta" / "sae_weights.safetensors").keys() >= {"W_dec", "threshold"}
    metadata = published.cfg.metadata.to_dict()
    assert metadata["model_name"] == "model" and metadata["hook_name"] == HOOK and metadata["context_size"] == 16
    settings = metadata["metasae_lightning"]
    assert settings["penalties"] == {"decomposability": 0.3} and settings["meta"] == {"id": f"{HOOK}-meta", "d_sae": 8}
    assert settings["recipe"]["data"]["init_args"]["corpus"]["class_path"].endswith("TextFiles")
    assert {"torch", "sae-lens", "metasae-lightning"} <= settings["versions"].keys()
    # The record and the command's output have the new measurement.
    record = json.loads((tmp_path / "out" / HOOK / "metasae.json").read_text())
    assert f"FVU {record['measured']['fvu']:.4f}, L0 {record['measured']['l0']:.2f} on {record['measured']['tokens']}" in output.out
    density = load_file(tmp_path / "out" / HOOK / "sparsity.safetensors")["sparsity"]
    assert density.shape == (48,) and (10**density).sum().item() == pytest.approx(record["measured"]["l0"], rel=1e-4)
    page = (tmp_path / "out" / "README.md").read_text()
    assert page.startswith("---\nlibrary_name: saelens\n") and f"| variance unexplained (FVU) | {record['measured']['fvu']:.4g} |" in page
    assert (
        "decomposability at weight 0.3" in page and "It was not evaluated on test documents" in page and f'load_from_disk("{HOOK}")' in page
    )
    assert "a local path: give its public name" in output.err
    all_bytes = b"".join(tree(tmp_path / "out").values()) + output.out.encode() + output.err.encode()
    assert TOKEN.encode() not in all_bytes and b"whichissecret" not in all_bytes
    assert str(tmp_path).encode() not in b"".join(tree(tmp_path / "out").values())  # of a local path only the last part is published


def test_the_page_has_the_evaluation_of_this_sae_on_the_runs_data(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    quick = ["--tokens", "300", "--splice_tokens", "100", "--critic_seeds", "0", "--resamples", "20"]
    assert main(["test", str(place), *quick]) == 0
    publish(place, "out", "--model_name", "someone/model", "--id", "layer_1/width_48")
    evaluation = json.loads((place / "evaluation.json").read_text())["evaluation"]
    page = (tmp_path / "out" / "README.md").read_text()
    low, high = evaluation["intervals"]["ce_sae"]
    assert f"| {evaluation['figures']['splice']['ce_sae']:.4g} | {low:.4g} to {high:.4g} |" in page
    assert "of test documents, which neither" in page and "base_model:\n- someone/model\n" in page and "## layer_1/width_48\n" in page
    # An SAE whose thresholds were changed after the evaluation is another SAE.
    assert main(["calibrate", str(place), "--l0", "4", "--calibration_tokens", "256"]) == 0
    publish(place, "later")
    assert "It was not evaluated on test documents" in (tmp_path / "later" / "README.md").read_text()
    assert "Thresholds: set for L0 4 by the rule `rate` on 2" in (tmp_path / "later" / "README.md").read_text()
    # An evaluation on other data does not count.
    other = tmp_path / "other.yaml"
    data = yaml.safe_load((place / "config.yaml").read_text())
    data["data"]["init_args"]["held_out"] = 0.3
    other.write_text(yaml.safe_dump(data))
    assert main(["test", str(place), "--data", str(other), *quick]) == 0
    publish(place, "last")
    assert "It was not evaluated on test documents" in (tmp_path / "last" / "README.md").read_text()
    assert "was evaluated on other data than its run's" in capsys.readouterr().err


def test_several_saes_share_a_folder_and_its_page(place: Path, tmp_path: Path):
    other = write_finished_run(tmp_path, "two", seed=5)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("---\nlicense: mit\n---\n# Ours\nWritten by hand.\n")
    publish(place, "out", "--id", "width_48/one")
    publish(other, "out", "--id", "width_48/two")
    before = tree(tmp_path / "out")
    page = before["README.md"].decode()
    assert page.startswith("---\nlicense: mit\n---\n# Ours\nWritten by hand.\n")
    assert page.count("## width_48/one\n") == page.count("## width_48/two\n") == page.count(model_card.BEGIN) == 1
    publish(other, "out", "--id", "width_48/two")  # publishing again changes nothing
    assert tree(tmp_path / "out") == before
    # An SAE whose id is the parent folder of the others changes neither them nor other files.
    (tmp_path / "out" / "width_48" / "NOTES.md").write_text("mine")
    (tmp_path / "out" / "width_48" / "odd").mkdir()
    (tmp_path / "out" / "width_48" / "odd" / "metasae.json").write_text("[1]")
    publish(place, "out", "--id", "width_48")
    after = tree(tmp_path / "out")
    assert {name: data for name, data in after.items() if name in before and name != "README.md"} == {
        name: data for name, data in before.items() if name != "README.md"
    }
    assert after["width_48/NOTES.md"] == b"mine" and after["README.md"].decode().count("\n## width_48") == 3


def test_another_sae_is_kept_unless_replaced_and_a_failed_replacement_is_undone(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    other = write_finished_run(tmp_path, "two", seed=5)
    publish(place, "out")
    before = tree(tmp_path / "out")
    assert f"holds another SAE under {HOOK}: choose another id, or replace it by --replace true" in publish_error(capsys, other, "out")
    assert tree(tmp_path / "out") == before
    # An SAE with the same config and other weights is another SAE too.
    shutil.copytree(place / "saes" / "primary", tmp_path / "twin")
    shutil.copy(other / "saes" / "primary" / "sae_weights.safetensors", tmp_path / "twin")
    with pytest.raises(InputError, match="holds another SAE"):
        publish_folders({HOOK: tmp_path / "twin"}, tmp_path / "out")
    # A disk that is full at any one of the renames.
    rename = Path.rename
    for failing_rename in range(1, 20):
        renamed = list[Path]()

        def fail_at_one_rename(self: Path, target: Path, failing_rename: int = failing_rename, renamed: list[Path] = renamed) -> Path:
            renamed.append(self)
            if len(renamed) == failing_rename:
                raise OSError(28, "No space left on device", str(target))
            return rename(self, target)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", fail_at_one_rename)
            status = main(["publish", str(other), "out", "--replace", "true", *QUICK])
        if not status:
            break
        assert "No space left on device" in capsys.readouterr().err
        assert tree(tmp_path / "out") == before and not list((tmp_path / "out").glob(".publishing*"))
    assert failing_rename > 10
    publish(other, "out", "--replace", "true")
    published, exported = (
        load_file(folder / "sae_weights.safetensors") for folder in (tmp_path / "out" / HOOK, other / "saes" / "primary")
    )
    assert torch.equal(published["W_dec"], exported["W_dec"])


def write_record(run_folder: Path, **figures: float) -> None:
    """Write a run's record of the export's measurement."""
    (run_folder / "evaluation.json").write_text(json.dumps({"validation": {"exported": {"primary": figures}}}))


def test_an_sae_that_measures_other_than_the_record_is_not_published(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_record(place, fvu=0.01, l0=8.0)
    error = publish_error(capsys, place, "out")
    assert "measures" in error and "the SAE, the model or the text is not what it was" in error
    (place / "evaluation.json").unlink()
    weights = load_file(place / "saes" / "primary" / "sae_weights.safetensors")
    save_file({**weights, "W_dec": -weights["W_dec"]}, place / "saes" / "primary" / "sae_weights.safetensors")
    assert "explains nothing of its activations" in publish_error(capsys, place, "out")
    weights["W_dec"][0, 0] = float("inf")
    save_file(weights, place / "saes" / "primary" / "sae_weights.safetensors")
    assert "has NaN or infinite numbers in W_dec" in publish_error(capsys, place, "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["ONE", "hf://nobody"], "'hf://nobody' is not a repository, which would be hf://OWNER/NAME"),
        (["ONE", "hf://a b/c"], "'hf://a b/c' is not a repository"),
        (["ONE", "out", "--private", "true"], "private and revision are options of the Hub, and out is a folder"),
        *((["ONE", "out", "--id", name], f"{name!r} is no id for an SAE") for name in ("", "../up", "w//one", "a/./b", "a/", "README.md")),
        (["ONE", "out", "--device", "tpu"], "device: 'tpu' is not there: there is "),
        (["ONE", "out", "--tokens", "0"], "tokens must be at least 1, got 0"),
        (["ONE/config.yaml", "out"], "config.yaml"),
        (["ONE", "ONE/config.yaml"], "is a file, and SAEs go into a folder"),
        (["ONE/saes/meta", "out"], "is no run: its recipe and its measurements are published along"),
        (["ONE", "out", "--idd", "x"], "there is no option idd (did you mean id?)"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(args: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]):
    assert message in publish_error(capsys, *(arg.replace("ONE", str(place)) for arg in args))


# The waits between the client's own tries are shortened.
PUBLISH = (
    "import sys; from huggingface_hub.utils import _http; from metasae_lightning.cli import main; "
    "_http.http_backoff.__kwdefaults__.update(base_wait_time=0.01, max_wait_time=0.01); sys.exit(main(['publish', *sys.argv[1:]]))"
)


@contextmanager
def client(hub: Hub, folder: Path) -> Generator[Callable[..., subprocess.CompletedProcess[str]]]:
    """A function that runs code, by default `metasae publish`, in a new process of the hub's client."""
    (folder / "home").mkdir()
    with PythonServer(hub.environment(folder / "home")) as server:

        def call(*args: str | Path, code: str = PUBLISH, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
            return server.run(code, *args, *(QUICK if code == PUBLISH else []), cwd=folder, HF_TOKEN=token)

        yield call


LOAD = (
    "import sys, torch; from sae_lens import SAE; "
    "sae, _, sparsity = SAE.from_pretrained_with_cfg_and_sparsity(*sys.argv[1:3]); "
    "sae.save_model(sys.argv[3]); print(tuple(sparsity.shape))"
)


def test_an_sae_published_to_the_hub_after_failures_loads_with_equal_weights(place: Path, tmp_path: Path):
    with Hub(tmp_path / "hub", token=TOKEN) as hub, client(hub, tmp_path) as call:
        repository = "hf://someone/saes"
        # First the uploads of objects fail, at each of six tries; then the commit fails; the third time all succeeds.
        failures = [[Fault("drop", on="upload", after=1)], [Fault("error", on="commit", times=1)]]
        outputs: list[str] = []
        for faults in failures:
            hub.faults[:] = faults
            failed = call(place, repository, "--private", "true", "--model_name", "someone/model")
            outputs += [failed.stdout, failed.stderr]
            assert failed.returncode == 2 and "the Hub request failed; try again" in failed.stderr
            assert not list((hub.folder / "models" / "someone" / "saes").glob("**/cfg.json"))
        hub.faults[:] = []
        done = call(place, repository, "--private", "true", "--model_name", "someone/model")
        assert done.returncode == 0, done.stderr
        loaded = call("someone/saes", HOOK, tmp_path / "back", code=LOAD)
        assert loaded.returncode == 0 and loaded.stdout.strip() == "(48,)", loaded.stderr
        sent = len(hub.log)
        again = call(place, repository, "--model_name", "someone/model")  # nothing new, nothing sent
        assert again.returncode == 0 and "PUT" not in {entry.method for entry in hub.log[sent:]}
        other = call(write_finished_run(tmp_path, "two", seed=5), repository, "--model_name", "someone/model")
        assert other.returncode == 2 and f"holds another SAE under {HOOK}" in other.stderr
        refused = call(place, "hf://someone/else", token="hf_wrongtokenwhichisnone")
        assert refused.returncode == 2 and refused.stderr.count("metasae: error: ") == 1
        outputs += [part for process in (done, again, other, refused, loaded) for part in (process.stdout, process.stderr)]
    ours, theirs = (load_file(folder / "sae_weights.safetensors") for folder in (place / "saes" / "primary", tmp_path / "back"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    page = (tmp_path / "hub" / "models" / "someone" / "saes" / "README.md").read_text()
    assert f'SAE.from_pretrained("someone/saes", "{HOOK}")' in page
    shutil.rmtree(tmp_path / "home")  # the client's own folder may have the token
    published = b"".join(path.read_bytes() for path in (tmp_path / "hub").rglob("*") if path.is_file())
    for secret in (TOKEN, "hf_wrongtokenwhichisnone"):
        assert secret not in "".join(outputs) and secret.encode() not in published


def test_a_new_branch_starts_from_main_and_leaves_main_unchanged(place: Path, tmp_path: Path):
    with Hub(tmp_path / "hub", token=TOKEN) as hub, client(hub, tmp_path) as call:
        first = call(place, "hf://someone/saes", "--private", "false", "--id", "a/b")
        assert first.returncode == 0, first.stderr
        main_branch = tree(hub.folder / "models" / "someone" / "saes")
        other = write_finished_run(tmp_path, "two", seed=5)
        conflict = call(other, "hf://someone/saes", "--revision", "trial", "--id", "a/b")
        assert conflict.returncode == 2 and "holds another SAE under a/b" in conflict.stderr
        done = call(other, "hf://someone/saes", "--revision", "trial", "--id", "a/c")
        assert done.returncode == 0, done.stderr
        public = call(other, "hf://someone/saes", "--private", "true", "--id", "a/d")
        assert public.returncode == 2 and "is public, and publishing does not change that" in public.stderr
    assert tree(hub.folder / "models" / "someone" / "saes") == main_branch
    (branch,) = (hub.folder / "internal").glob("**/trial")
    page = (branch / "README.md").read_text()
    assert "\n## a/b\n" in page and "\n## a/c\n" in page


def test_publish_called_from_python_checks_and_copies_folders(tmp_path: Path):
    sae().save_model(tmp_path / "one")
    assert publish_folders({"a/one": tmp_path / "one"}, tmp_path / "out") == str(tmp_path / "out")
    assert set(tree(tmp_path / "out")) == {"a/one/cfg.json", "a/one/sae_weights.safetensors"}
    (tmp_path / "one" / "sae_weights.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="cannot be loaded"):
        publish_folders({"a/two": tmp_path / "one"}, tmp_path / "out")
    with pytest.raises(InputError, match="is a file"):
        open_destination(tmp_path / "one" / "cfg.json")


def test_tokens_and_passwords_are_not_published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-form")
    assert redact({"a": [{"use_auth_token": 1, "b": "x a-token-of-another-form y"}], "n": 3}) == {"a": [{"b": "x hf_*** y"}], "n": 3}
    harmless = {"sequence_separator_token": "eos", "training_tokens": 5, "path": "/data/hf_cache/hf_datasets/c4"}
    assert redact(harmless) == harmless
    assert redact(dict.fromkeys(("access_token", "hub_token", "Authorization", "api_key", "HF_TOKEN", "my_password"), "x")) == {}
    sae(model_from_pretrained_kwargs={"token": TOKEN, "revision": "main"}).save_model(tmp_path / "one")
    (tmp_path / "one" / ".env").write_text(TOKEN)
    publish_folders({"one": tmp_path / "one"}, tmp_path / "out")
    assert set(tree(tmp_path / "out")) == {"one/cfg.json", "one/sae_weights.safetensors"}
    assert json.loads((tmp_path / "out" / "one" / "cfg.json").read_text())["metadata"]["model_from_pretrained_kwargs"] == {
        "revision": "main"
    }
