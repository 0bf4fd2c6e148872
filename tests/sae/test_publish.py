"""From a run to what others load: the same codes, a page that says what was measured, and nothing half there."""

import json
import shutil
import subprocess
import sys
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
from tests.helpers.judged import HOOK, run, sae

ROOT = Path(__file__).parents[2]
TOKEN = "hf_testtokenwhichissecret"
FILES = {"cfg.json", "metasae.json", "sae_weights.safetensors", "sparsity.safetensors"}
QUICK = ["--tokens", "256"]


def finished(folder: Path, name: str = "one", *, seed: int = 0) -> Path:
    """A run as one leaves it, its meta SAE and its recipe's model among the rest; somebody wrote a token into the recipe."""
    told = {"dataset_path": "some text", "training_architecture": "batchtopk", "exclude_special_tokens": True, "context_size": 16}
    place = run(folder, name, seed=seed, model_from_pretrained_kwargs={"token": TOKEN}, **told)
    sae(1, 8, 0.1).save_model(place / "saes" / "meta")
    tree = yaml.safe_load((place / "config.yaml").read_text())
    primary = {"class_path": "sae_lens.BatchTopKTrainingSAEConfig", "init_args": {"d_in": 32, "d_sae": 48, "k": 8}}
    meta = {"class_path": "sae_lens.BatchTopKTrainingSAEConfig", "init_args": {"d_in": 32, "d_sae": 8, "k": 2}}
    penalties = {"decomposability": {"class_path": "Decomposability", "init_args": {"weight": 0.3, "sigma_sq": 1.0}}}
    tree["model"] = {"class_path": "metasae_lightning.JointSAE", "init_args": {"primary": primary, "meta": meta, "penalties": penalties}}
    tree["data"]["init_args"]["language_model"]["init_args"]["model_kwargs"] = {"token": TOKEN}
    (place / "config.yaml").write_text(yaml.safe_dump(tree))
    return place


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return finished(tmp_path)


def publish(*args: str | Path, rc: int = 0) -> None:
    assert main(["publish", *map(str, args), *QUICK]) == rc


def failing(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    assert main(["publish", *map(str, args), *([] if "--tokens" in args else QUICK)]) == 2
    lines = [line for line in capsys.readouterr().err.split("\n") if line.startswith("metasae: error: ")]
    assert len(lines) == 1
    return lines[0]


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_holds_what_others_load(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    publish(place, "out")
    said = capsys.readouterr()
    names = {f"{HOOK}/{name}" for name in FILES} | {f"{HOOK}-meta/cfg.json", f"{HOOK}-meta/sae_weights.safetensors", "README.md"}
    assert set(tree(tmp_path / "out")) == names
    theirs, ours = SAE.load_from_disk(tmp_path / "out" / HOOK), pretrained.load_pretrained(place / "saes" / "primary")
    x = torch.randn(64, 32)
    assert torch.equal(theirs.encode(x), ours.encode(x)) and torch.equal(theirs(x), ours(x))
    assert load_file(tmp_path / "out" / f"{HOOK}-meta" / "sae_weights.safetensors").keys() >= {"W_dec", "threshold"}
    told = theirs.cfg.metadata.to_dict()
    assert told["model_name"] == str(tmp_path / "model") and told["hook_name"] == HOOK and told["context_size"] == 16
    about = told["metasae_lightning"]
    assert about["penalties"] == {"decomposability": 0.3} and about["meta"] == {"id": f"{HOOK}-meta", "d_sae": 8}
    assert about["recipe"]["data"]["init_args"]["corpus"]["class_path"].endswith("TextFiles")
    assert {"torch", "sae-lens", "metasae-lightning"} <= about["versions"].keys()
    # Measured again here, on the tokens that the page says.
    record = json.loads((tmp_path / "out" / HOOK / "metasae.json").read_text())
    assert f"FVU {record['measured']['fvu']:.4f}, L0 {record['measured']['l0']:.2f} on {record['measured']['tokens']}" in said.out
    density = load_file(tmp_path / "out" / HOOK / "sparsity.safetensors")["sparsity"]
    assert density.shape == (48,) and (10**density).sum().item() == pytest.approx(record["measured"]["l0"], rel=1e-4)
    page = (tmp_path / "out" / "README.md").read_text()
    assert page.startswith("---\nlibrary_name: saelens\n") and f"| variance unexplained (FVU) | {record['measured']['fvu']:.4g} |" in page
    assert (
        "decomposability at weight 0.3" in page and "It was not evaluated on test documents" in page and f'load_from_disk("{HOOK}")' in page
    )
    assert "a local path: give its public name" in said.err
    everything = b"".join(tree(tmp_path / "out").values()) + said.out.encode() + said.err.encode()
    assert TOKEN.encode() not in everything and b"whichissecret" not in everything


def test_the_full_evaluation_goes_onto_the_page(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    quick = ["--tokens", "300", "--splice_tokens", "100", "--critic_seeds", "0", "--resamples", "20"]
    assert main(["test", str(place), *quick]) == 0
    publish(place, "out", "--model_name", "someone/model", "--id", "layer_1/width_48")
    found = json.loads((place / "evaluation.json").read_text())["evaluation"]
    page = (tmp_path / "out" / "README.md").read_text()
    low, high = found["intervals"]["ce_sae"]
    assert f"| {found['figures']['splice']['ce_sae']:.4g} | {low:.4g} to {high:.4g} |" in page
    assert "of test documents, which neither" in page and "base_model:\n- someone/model\n" in page and "## layer_1/width_48\n" in page
    # Thresholds that were set since are another SAE's.
    assert main(["calibrate", str(place), "--l0", "4", "--calibration_tokens", "256"]) == 0
    publish(place, "later")
    assert "It was not evaluated on test documents" in (tmp_path / "later" / "README.md").read_text()
    assert "Thresholds: set for L0 4 by the rule `rate` on 2" in (tmp_path / "later" / "README.md").read_text()
    # An evaluation of other data is no test of the run's.
    other = tmp_path / "other.yaml"
    data = yaml.safe_load((place / "config.yaml").read_text())
    data["data"]["init_args"]["held_out"] = 0.3
    other.write_text(yaml.safe_dump(data))
    assert main(["test", str(place), "--data", str(other), *quick]) == 0
    publish(place, "last")
    assert "It was not evaluated on test documents" in (tmp_path / "last" / "README.md").read_text()
    assert "was evaluated on other data than its own" in capsys.readouterr().err


def test_several_saes_share_a_folder_and_its_page(place: Path, tmp_path: Path):
    other = finished(tmp_path, "two", seed=5)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("---\nlicense: mit\n---\n# Ours\nWritten by hand.\n")
    publish(place, "out", "--id", "width_48/one")
    publish(other, "out", "--id", "width_48/two")
    before = tree(tmp_path / "out")
    page = before["README.md"].decode()
    assert page.startswith("---\nlicense: mit\n---\n# Ours\nWritten by hand.\n")
    assert page.count("## width_48/one\n") == page.count("## width_48/two\n") == page.count(model_card.BEGIN) == 1
    publish(other, "out", "--id", "width_48/two")  # the same again
    assert tree(tmp_path / "out") == before
    # Under an id above them nothing of theirs moves, nor what is nobody's.
    (tmp_path / "out" / "width_48" / "NOTES.md").write_text("mine")
    (tmp_path / "out" / "width_48" / "odd").mkdir()
    (tmp_path / "out" / "width_48" / "odd" / "metasae.json").write_text("[1]")
    publish(place, "out", "--id", "width_48")
    after = tree(tmp_path / "out")
    assert {name: data for name, data in after.items() if name in before and name != "README.md"} == {
        name: data for name, data in before.items() if name != "README.md"
    }
    assert after["width_48/NOTES.md"] == b"mine" and after["README.md"].decode().count("\n## width_48") == 3


def test_what_is_there_is_not_lost(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    other = finished(tmp_path, "two", seed=5)
    publish(place, "out")
    before = tree(tmp_path / "out")
    assert f"holds another SAE under {HOOK}: choose another id, or replace it by --replace true" in failing(capsys, other, "out")
    assert tree(tmp_path / "out") == before
    # The same config, other weights: as much another SAE.
    shutil.copytree(place / "saes" / "primary", tmp_path / "twin")
    shutil.copy(other / "saes" / "primary" / "sae_weights.safetensors", tmp_path / "twin")
    with pytest.raises(InputError, match="holds another SAE"):
        publish_folders({HOOK: tmp_path / "twin"}, tmp_path / "out")
    # A disk that is full at any of the renames.
    rename = Path.rename
    for broken in range(1, 20):
        renamed = list[Path]()

        def full(self: Path, target: Path, broken: int = broken, renamed: list[Path] = renamed) -> Path:
            renamed.append(self)
            if len(renamed) == broken:
                raise OSError(28, "No space left on device", str(target))
            return rename(self, target)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", full)
            done = main(["publish", str(other), "out", "--replace", "true", *QUICK])
        if not done:
            break
        assert "No space left on device" in capsys.readouterr().err
        assert tree(tmp_path / "out") == before and not list((tmp_path / "out").glob(".publishing*"))
    assert broken > 10
    publish(other, "out", "--replace", "true")
    theirs, ours = (load_file(folder / "sae_weights.safetensors") for folder in (tmp_path / "out" / HOOK, other / "saes" / "primary"))
    assert torch.equal(theirs["W_dec"], ours["W_dec"])


def recorded(place: Path, **figures: float) -> None:
    (place / "evaluation.json").write_text(json.dumps({"validation": {"exported": {"primary": figures}}}))


def test_an_sae_that_is_not_what_the_run_left_stays_at_home(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recorded(place, fvu=0.01, l0=8.0)
    said = failing(capsys, place, "out")
    assert "measures" in said and "the SAE, the model or the text is not what it was" in said
    (place / "evaluation.json").unlink()
    weights = load_file(place / "saes" / "primary" / "sae_weights.safetensors")
    save_file({**weights, "W_dec": -weights["W_dec"]}, place / "saes" / "primary" / "sae_weights.safetensors")
    assert "explains nothing of its activations" in failing(capsys, place, "out")
    weights["W_dec"][0, 0] = float("inf")
    save_file(weights, place / "saes" / "primary" / "sae_weights.safetensors")
    assert "has NaN or infinite numbers in W_dec" in failing(capsys, place, "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["ONE", "hf://nobody"], "'hf://nobody' is not a repository, which would be hf://OWNER/NAME"),
        (["ONE", "hf://a b/c"], "'hf://a b/c' is not a repository"),
        (["ONE", "out", "--private", "true"], "private and revision are options of the Hub, and out is a folder"),
        *((["ONE", "out", "--id", name], f"{name!r} is no id for an SAE") for name in ("../up", "w//one", "a/./b", "a/", "README.md")),
        (["ONE", "out", "--tokens", "0"], "tokens must be at least 1, got 0"),
        (["ONE/config.yaml", "out"], "config.yaml"),
        (["ONE", "ONE/config.yaml"], "is a file, and SAEs go into a folder"),
        (["ONE/saes/meta", "out"], "is no run: its recipe and its measurements are published along"),
        (["ONE", "out", "--idd", "x"], "there is no option idd (did you mean id?)"),
    ],
)
def test_what_cannot_be_published(args: list[str], says: str, place: Path, capsys: pytest.CaptureFixture[str]):
    assert says in failing(capsys, *(arg.replace("ONE", str(place)) for arg in args))


def client(hub: Hub, home: Path, *args: str | Path, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """`metasae publish` as a process of its own; only the waits between the client's own tries are shortened."""
    code = (
        "import sys; from huggingface_hub.utils import _http; from metasae_lightning.cli import main; "
        "_http.http_backoff.__kwdefaults__.update(base_wait_time=0.01, max_wait_time=0.01); sys.exit(main(sys.argv[1:]))"
    )
    environment = hub.environment(home, HF_TOKEN=token, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", code, "publish", *map(str, args), *QUICK]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=home.parent, check=False)


LOAD = (
    "import sys, torch; from sae_lens import SAE; "
    "sae, _, sparsity = SAE.from_pretrained_with_cfg_and_sparsity(*sys.argv[1:3]); "
    "sae.save_model(sys.argv[3]); print(tuple(sparsity.shape))"
)


def test_the_hub_gives_back_what_it_was_given(place: Path, tmp_path: Path):
    with Hub(tmp_path / "hub", token=TOKEN) as hub:
        home, repository = tmp_path / "home", "hf://someone/saes"
        home.mkdir()
        # The objects break off, six tries long; then the commit fails; then all is well.
        broken = [[Fault("drop", on="upload", after=1)], [Fault("error", on="commit", times=1)]]
        outputs: list[str] = []
        for faults in broken:
            hub.faults[:] = faults
            failed = client(hub, home, place, repository, "--private", "true", "--model_name", "someone/model")
            outputs += [failed.stdout, failed.stderr]
            assert failed.returncode == 2 and "the Hub request failed; try again" in failed.stderr
            assert not list((hub.folder / "models" / "someone" / "saes").glob("**/cfg.json"))
        hub.faults[:] = []
        done = client(hub, home, place, repository, "--private", "true", "--model_name", "someone/model")
        assert done.returncode == 0, done.stderr
        environment = hub.environment(home, HF_TOKEN=TOKEN, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
        command = [sys.executable, "-c", LOAD, "someone/saes", HOOK, str(tmp_path / "back")]
        loaded = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert loaded.returncode == 0 and loaded.stdout.strip() == "(48,)", loaded.stderr
        sent = len(hub.log)
        again = client(hub, home, place, repository, "--model_name", "someone/model")  # nothing new, nothing sent
        assert again.returncode == 0 and "PUT" not in {entry.method for entry in hub.log[sent:]}
        other = client(hub, home, finished(tmp_path, "two", seed=5), repository, "--model_name", "someone/model")
        assert other.returncode == 2 and f"holds another SAE under {HOOK}" in other.stderr
        refused = client(hub, home, place, "hf://someone/else", token="hf_wrongtokenwhichisnone")
        assert refused.returncode == 2 and refused.stderr.count("metasae: error: ") == 1
        outputs += [part for each in (done, again, other, refused, loaded) for part in (each.stdout, each.stderr)]
    ours, theirs = (load_file(folder / "sae_weights.safetensors") for folder in (place / "saes" / "primary", tmp_path / "back"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    page = (tmp_path / "hub" / "models" / "someone" / "saes" / "README.md").read_text()
    assert f'SAE.from_pretrained("someone/saes", "{HOOK}")' in page
    shutil.rmtree(home)  # the client's own
    kept = b"".join(path.read_bytes() for path in (tmp_path / "hub").rglob("*") if path.is_file())
    for secret in (TOKEN, "hf_wrongtokenwhichisnone"):
        assert secret not in "".join(outputs) and secret.encode() not in kept


def test_a_branch_goes_on_from_the_main_one(place: Path, tmp_path: Path):
    with Hub(tmp_path / "hub", token=TOKEN) as hub:
        home = tmp_path / "home"
        home.mkdir()
        first = client(hub, home, place, "hf://someone/saes", "--private", "false", "--id", "a/b")
        assert first.returncode == 0, first.stderr
        main_one = tree(hub.folder / "models" / "someone" / "saes")
        other = finished(tmp_path, "two", seed=5)
        taken = client(hub, home, other, "hf://someone/saes", "--revision", "trial", "--id", "a/b")
        assert taken.returncode == 2 and "holds another SAE under a/b" in taken.stderr
        done = client(hub, home, other, "hf://someone/saes", "--revision", "trial", "--id", "a/c")
        assert done.returncode == 0, done.stderr
        public = client(hub, home, other, "hf://someone/saes", "--private", "true", "--id", "a/d")
        assert public.returncode == 2 and "is public, and publishing does not change that" in public.stderr
    assert tree(hub.folder / "models" / "someone" / "saes") == main_one
    (branch,) = (hub.folder / "beside").glob("**/trial")
    page = (branch / "README.md").read_text()
    assert "\n## a/b\n" in page and "\n## a/c\n" in page


def test_a_notebook_publishes_folders(tmp_path: Path):
    sae().save_model(tmp_path / "one")
    assert publish_folders({"a/one": tmp_path / "one"}, tmp_path / "out") == str(tmp_path / "out")
    assert set(tree(tmp_path / "out")) == {"a/one/cfg.json", "a/one/sae_weights.safetensors"}
    (tmp_path / "one" / "sae_weights.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="cannot be loaded"):
        publish_folders({"a/two": tmp_path / "one"}, tmp_path / "out")
    with pytest.raises(InputError, match="is a file"):
        open_destination(tmp_path / "one" / "cfg.json")


def test_what_opens_doors_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-form")
    assert redact({"a": [{"use_auth_token": 1, "b": "x a-token-of-another-form y"}], "n": 3}) == {"a": [{"b": "x hf_*** y"}], "n": 3}
    honest = {"sequence_separator_token": "eos", "training_tokens": 5, "path": "/data/hf_cache/hf_datasets/c4"}
    assert redact(honest) == honest
    assert redact(dict.fromkeys(("access_token", "hub_token", "Authorization", "api_key", "HF_TOKEN", "my_password"), "x")) == {}
    sae(model_from_pretrained_kwargs={"token": TOKEN, "revision": "main"}).save_model(tmp_path / "one")
    (tmp_path / "one" / ".env").write_text(TOKEN)
    publish_folders({"one": tmp_path / "one"}, tmp_path / "out")
    assert set(tree(tmp_path / "out")) == {"one/cfg.json", "one/sae_weights.safetensors"}
    assert json.loads((tmp_path / "out" / "one" / "cfg.json").read_text())["metadata"]["model_from_pretrained_kwargs"] == {
        "revision": "main"
    }
