"""Checkpoints are written atomically and between steps, the newest intact one is found, and a stopped or killed run resumes from it."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file

from metasae_lightning.callbacks import Checkpoints, checkpoints
from metasae_lightning.cli import main
from metasae_lightning.data import SyntheticDataModule
from metasae_lightning.data.synthetic import SyntheticModelConfig
from metasae_lightning.errors import InputError
from metasae_lightning.penalties import Decomposability
from metasae_lightning.training import JointSAE
from metasae_lightning.training.checkpoint_files import (
    AtomicCheckpointIO,
    find_damage,
    is_restarted_job,
    last_checkpoint,
    link_and_prune,
    newest_intact,
)
from tests.helpers.architectures import D_IN, config
from tests.helpers.command_line import CommandLine
from tests.helpers.models import documents, save_model

ROOT = Path(__file__).parents[2]
QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}


def write(path: Path, number: float) -> None:
    AtomicCheckpointIO().save_checkpoint({"weights": torch.full((1000,), number)}, path)


def test_a_failed_write_leaves_the_older_checkpoint_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "a.ckpt", 1.0)

    def write_half_and_fail(_: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", write_half_and_fail)
    with pytest.raises(InputError, match=r"a\.ckpt cannot be written, and those before it are as they were .*No space left.* MiB are free"):
        write(tmp_path / "a.ckpt", 2.0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
    assert torch.load(tmp_path / "a.ckpt")["weights"].eq(1.0).all()


class MakeCheckpointsImmutable(Callback):
    """After `after` tokens, makes the folder of checkpoints immutable: not even root can write to it."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.rows_seen == self.after:
            subprocess.run(["chattr", "+i", Path(trainer.default_root_dir) / "checkpoints"], check=True)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_a_folder_that_becomes_read_only_keeps_its_checkpoints(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    has_chattr = shutil.which("chattr") and not subprocess.run(["chattr", "+i", folder], capture_output=True, check=False).returncode
    if not has_chattr:
        pytest.skip("needs chattr, a file system that supports it, and root")
    subprocess.run(["chattr", "-i", folder], check=True)
    try:
        with pytest.raises(InputError, match=r"tokens=256\.ckpt cannot be written, and those before it are as they were .*not permitted"):
            fit_joint(tmp_path, MakeCheckpointsImmutable(192), Checkpoints(every_tokens=64))
    finally:
        subprocess.run(["chattr", "-i", folder], check=True)
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "tokens=128.ckpt", "tokens=192.ckpt"]
    assert newest_intact([folder]) == (folder / "tokens=192.ckpt", {})


def test_a_checkpoint_that_does_not_read_back_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "save", lambda _, file: file.write(b"PK nothing"))
    with pytest.raises(InputError, match="does not read back"):
        write(tmp_path / "a.ckpt", 1.0)
    assert not list(tmp_path.iterdir())


def damage(path: Path, kind: str) -> None:
    """Truncate or empty a checkpoint, flip one bit of its weights (`flipped`), or one of its zip directory (`marked`)."""
    data = bytearray(path.read_bytes())
    if kind == "flipped":
        position = data.index(torch.full((4,), 3.0).numpy().tobytes())
        data[position] ^= 1
    if kind == "marked":  # sets the zip entry's flag for encryption
        data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data[: len(data) // 2] if kind == "truncated" else b"" if kind == "emptied" else data)


@pytest.mark.parametrize("kind", ["truncated", "flipped", "marked", "emptied"])
def test_damage_is_detected_and_the_previous_checkpoint_is_used(tmp_path: Path, kind: str):
    for number in (1, 2, 3):
        write(tmp_path / f"tokens={number}.ckpt", float(number))
        os.utime(tmp_path / f"tokens={number}.ckpt", ns=(number, number))
    assert newest_intact([tmp_path]) == (tmp_path / "tokens=3.ckpt", {})
    damage(tmp_path / "tokens=3.ckpt", kind)
    os.utime(tmp_path / "tokens=3.ckpt", ns=(3, 3))
    checkpoint, damaged = newest_intact([tmp_path])
    assert checkpoint == tmp_path / "tokens=2.ckpt" and list(damaged) == [tmp_path / "tokens=3.ckpt"]
    with pytest.raises(InputError, match=r"tokens=3\.ckpt is damaged .* --ckpt_path last"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "tokens=3.ckpt")
    assert find_damage(checkpoint) is None


def test_a_job_restarted_by_slurm_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not is_restarted_job(tmp_path)  # the first start wrote no checkpoint
    write(tmp_path / "checkpoints" / "tokens=1.ckpt", 1.0)
    assert is_restarted_job(tmp_path) and last_checkpoint(tmp_path) == str(tmp_path / "checkpoints" / "tokens=1.ckpt")
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert not is_restarted_job(tmp_path)


def test_saving_removes_unfinished_files_of_a_killed_process_and_old_checkpoints(tmp_path: Path):
    (tmp_path / ".tokens=1.ckpt.4242").write_bytes(b"half")
    for number in (1, 2, 3):
        write(tmp_path / f"tokens={number}.ckpt", float(number))
        link_and_prune(tmp_path / f"tokens={number}.ckpt", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "tokens=2.ckpt", "tokens=3.ckpt"]


class SendSignal(Callback):
    """Sends a signal to this process at the start of a step."""

    def __init__(self, at: int, number: signal.Signals) -> None:
        self.at, self.number = at, number

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.at:
            os.kill(os.getpid(), self.number)


def fit_joint(folder: Path, *callbacks: Callback, checkpoint: Path | None = None, **trainer_args: Any) -> JointSAE:
    module = JointSAE(config("batchtopk"), config("topk", d_sae=8), {"d": Decomposability(0.3)}, n_p=3, n_m=2)
    data = SyntheticDataModule(SyntheticModelConfig(num_features=32, hidden_dim=D_IN, seed=0), tokens=768, batch_size=64)
    options: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "limit_val_batches": 0,
        "plugins": [AtomicCheckpointIO()],
        **QUIET,
        **trainer_args,
    }
    Trainer(default_root_dir=folder, callbacks=list(callbacks), **options).fit(module, datamodule=data, ckpt_path=checkpoint)
    return module


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_the_newest_checkpoints_are_kept_and_last_links_to_the_newest(tmp_path: Path):
    fit_joint(tmp_path, Checkpoints(every_tokens=128, every_minutes=None, keep=3))
    tokens_of_checkpoints = sorted(int(path.stem.split("=")[1]) for path in (tmp_path / "checkpoints").glob("tokens=*.ckpt"))
    assert tokens_of_checkpoints == [512, 640, 768]  # every second batch of 64 tokens, and the end
    assert (tmp_path / "checkpoints" / "last.ckpt").resolve().name == "tokens=768.ckpt"


class SlowSteps(Callback):
    """Moves the clock of `Checkpoints` on by `seconds` at each step."""

    def __init__(self, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.seconds = 0.0, seconds
        monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: self.now))

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.now += self.seconds


@pytest.mark.parametrize(
    ("seconds", "options", "expected"),
    [
        (6.0, {}, [128, 640, 768]),  # after ten seconds, after a minute, and the end of 12 steps
        (60.0, {"every_minutes": None, "every_tokens": 9999}, [64, 768]),
        (6.0, {"every_minutes": None}, [768]),  # no interval
        (0.1, {}, [768]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_two_checkpoints_are_written_soon_after_the_start(
    seconds: float, options: dict[str, Any], expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fit_joint(tmp_path, SlowSteps(seconds, monkeypatch), Checkpoints(**{"keep": 9, **options}))
    assert sorted(int(path.stem.split("=")[1]) for path in (tmp_path / "checkpoints").glob("tokens=*.ckpt")) == expected


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_a_stop_signal_writes_a_checkpoint_after_the_step_and_the_run_resumes(
    number: signal.Signals, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(checkpoints, "leave_terminal", lambda: None)  # pytest's own, where it has one
    uninterrupted = fit_joint(tmp_path / "whole")
    before = signal.getsignal(number)
    # A shell's background jobs ignore SIGINT, and a command under nohup ignores SIGHUP.
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    with pytest.raises(SystemExit, match=f"^{status}$"):
        fit_joint(tmp_path, Checkpoints(), SendSignal(4, number))
    signal.signal(number, before)  # SIGINT is ignored after the first one
    checkpoint, damaged = newest_intact([tmp_path / "checkpoints"])
    assert checkpoint is not None and checkpoint.name == "tokens=320.ckpt" and not damaged
    resumed = fit_joint(tmp_path / "resumed", Checkpoints(), checkpoint=checkpoint)
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in uninterrupted.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_an_ignored_hangup_stays_ignored(tmp_path: Path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    fit_joint(tmp_path, Checkpoints(), SendSignal(4, signal.SIGHUP))
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN
    assert newest_intact([tmp_path / "checkpoints"])[0] == tmp_path / "checkpoints" / "tokens=768.ckpt"


def test_after_a_hangup_nothing_is_printed_to_the_terminal_and_a_file_is_still_written_to(tmp_path: Path):
    master, terminal = os.openpty()
    with (tmp_path / "out").open("w") as file:
        checkpoints.leave_terminal((terminal, file.fileno()))
        os.close(master)
        os.write(terminal, b"gone")
        os.write(file.fileno(), b"kept")
    os.close(terminal)
    assert (tmp_path / "out").read_text() == "kept"


class RecordValidations(Callback):
    """Records the number of tokens at each validation; raises at the start of the one at `ends_at` tokens."""

    def __init__(self, ends_at: int | None = None) -> None:
        self.ends_at, self.tokens = ends_at, list[int]()

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if pl_module.rows_seen == self.ends_at:
            raise RuntimeError("the machine is gone")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.tokens.append(pl_module.rows_seen)


@pytest.mark.parametrize("killed", [True, False])
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_a_run_resumes_from_before_or_after_a_validation(killed: bool, tmp_path: Path):
    # Batches of 64 tokens: validations at 256, 512 and 768.
    validate_often: dict[str, Any] = {"limit_val_batches": 1, "val_check_interval": 4}
    all_validations, before_the_stop, after_the_stop = RecordValidations(), RecordValidations(512 if killed else None), RecordValidations()
    expected = fit_joint(tmp_path / "whole", all_validations, **validate_often)
    before = signal.getsignal(signal.SIGTERM)
    # Either a checkpoint is due at every validation, or SIGTERM arrives in the step before the second one.
    signals = [] if killed else [SendSignal(7, signal.SIGTERM)]
    with pytest.raises(RuntimeError if killed else SystemExit):
        fit_joint(tmp_path, before_the_stop, *signals, Checkpoints(every_tokens=256 if killed else None), **validate_often)
    signal.signal(signal.SIGTERM, before)
    checkpoint, _ = newest_intact([tmp_path / "checkpoints"])
    assert checkpoint is not None and checkpoint.name == f"tokens={256 if killed else 512}.ckpt"
    resumed = fit_joint(tmp_path / "resumed", after_the_stop, Checkpoints(), checkpoint=checkpoint, **validate_often)
    assert all_validations.tokens == before_the_stop.tokens + after_the_stop.tokens == [256, 512, 768]
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in expected.state_dict().items())


def fit_command(run: Path, *more: str) -> list[str]:
    overlay = run.parent / "often.yaml"
    callbacks = [{"class_path": "Export"}, {"class_path": "Checkpoints", "init_args": {"every_tokens": 4096}}]
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    sizes = ["--data.init_args.tokens", "131072", "--data.init_args.validation_tokens", "4096", "--data.init_args.batch_size", "512"]
    return [sys.executable, str(ROOT / "cli.py"), "fit", "-c", "synthetic", "-c", str(overlay), "--run", str(run), *sizes, *more]


def start_command(run: Path, *more: str) -> subprocess.Popen[str]:
    # One thread, so that sums have one order and runs are bit-equal.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        fit_command(run, *more),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start_in_forked_process(run: Path, *more: str) -> CommandLine:
    """Start the same command in forked processes, which have imported everything."""
    return CommandLine(fit_command(run, *more)[2:], cwd=ROOT)


def run_to_end(run: Path, *more: str) -> None:
    process = start_in_forked_process(run, *more)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr[-3000:]


def saes_are_equal(run_a: Path, run_b: Path) -> bool:
    weights = [load_file(run / "saes" / role / "sae_weights.safetensors") for run in (run_a, run_b) for role in ("primary", "meta")]
    return all(torch.equal(a[key], b[key]) for a, b in (weights[::2], weights[1::2]) for key in a)


TWO_RANKS = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


def test_two_ranks_killed_or_stopped_and_resumed_equal_an_uninterrupted_run(tmp_path: Path):
    ranks = TWO_RANKS
    run_to_end(tmp_path / "whole", *ranks)
    run = tmp_path / "run"
    for number, signal_number in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)):
        process = start_in_forked_process(run, *ranks, *(["--ckpt_path", "last"] if number else []))
        before, deadline = newest_intact([run / "checkpoints"])[0], time.monotonic() + 200
        while newest_intact([run / "checkpoints"])[0] == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if signal_number == signal.SIGKILL:
            process.kill()
        else:
            process.send_signal(signal_number)
        _, stderr = process.communicate(timeout=200)
        # The third run resumes from the checkpoint that the second wrote on SIGTERM.
        assert ("SIGTERM: a checkpoint is written" in stderr) == (signal_number == signal.SIGTERM), stderr[-3000:]
        assert process.returncode == (143 if signal_number == signal.SIGTERM else -signal.SIGKILL)
        assert not (run / "saes").exists(), "the run ended before the signal"
    newest, _ = newest_intact([run / "checkpoints"])
    assert newest is not None
    damage(newest, "truncated")
    run_to_end(run, *ranks, "--ckpt_path", "last")
    assert saes_are_equal(tmp_path / "whole", run)


def tiny_quickstart(folder: Path) -> Path:
    """The quickstart's recipe with its arms, on activations of a tiny language model over 400 documents."""
    save_model(folder / "tiny", "llama", layers=2)
    (folder / "text.txt").write_text("\n\n".join(documents(400)))
    tree = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    lm = {
        "class_path": "metasae_lightning.lm.HuggingFaceLM",
        "init_args": {"name": str(folder / "tiny"), "hook": "blocks.1.hook_resid_post"},
    }
    corpus = {"class_path": "metasae_lightning.corpora.TextFiles", "init_args": {"paths": str(folder / "text.txt")}}
    sizes = {"tokens": 64_000, "batch_size": 64, "context_size": 12, "buffer_size": 640, "held_out": 0.1, "validation_tokens": 640}
    tree["data"]["init_args"] = {"language_model": lm, "corpus": corpus, **sizes, "test_tokens": 640}
    for role, size in (("primary", 64), ("meta", 16)):
        tree["model"]["init_args"][role]["init_args"] |= {"d_in": 32, "d_sae": size, "k": 4}
    tree["trainer"]["callbacks"][-1] = {"class_path": "Checkpoints", "init_args": {"every_tokens": 640}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder / "recipe.yaml"


def results_of(run: Path) -> dict[str, Any]:
    """Weights of every exported SAE, and the figures without durations."""
    results: dict[str, Any] = {str(path.relative_to(run)): load_file(path) for path in run.glob("arms/*/saes/*/sae_weights.safetensors")}
    arms = json.loads((run / "evaluation.json").read_text().replace(str(run), ""))["arms"]  # the record has paths in the run's folder
    figures = {name: {key: value for key, value in arm["validation"].items() if "second" not in key} for name, arm in arms.items()}
    return {**results, "figures": figures}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(), TWO_RANKS], ids=["alone", "two ranks"])
def test_a_run_killed_at_twenty_random_points_equals_an_uninterrupted_run(ranks: tuple[str, ...], tmp_path: Path):
    recipe, rng = tiny_quickstart(tmp_path), random.Random(0)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(run: Path, *more: str) -> subprocess.Popen[str]:
        words = [sys.executable, str(ROOT / "cli.py"), "fit", "-c", str(recipe), "--run", str(run), *ranks, *more]
        return subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    process = start(tmp_path / "whole")
    _, stderr = process.communicate(timeout=1200)
    assert process.returncode == 0, stderr[-3000:]
    run, kills = tmp_path / "run", 0
    while kills < 20:
        has_checkpoint = (run / "checkpoints" / "last.ckpt").exists()
        process = start(run, *(["--ckpt_path", "last"] if has_checkpoint else []))
        n_new, deadline = rng.randrange(1, 4), time.monotonic() + 600
        older: set[Path] = set(run.glob("checkpoints/tokens=*.ckpt"))
        while len(set(run.glob("checkpoints/tokens=*.ckpt")) - older) < n_new and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.2)
        assert process.poll() is None, "the run ended before the kill"
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
    process = start(run, "--ckpt_path", "last")
    _, stderr = process.communicate(timeout=1200)
    assert process.returncode == 0, stderr[-3000:]
    expected, results = results_of(tmp_path / "whole"), results_of(run)
    assert results.keys() == expected.keys() and len(results) == 6  # three arms' primaries, two metas, figures
    assert results.pop("figures") == expected.pop("figures")
    assert all(torch.equal(results[name][key], value) for name, weights in expected.items() for key, value in weights.items())


def test_resuming_without_an_intact_checkpoint_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "tokens=1.ckpt").write_bytes(b"PK")
    assert main([*fit_command(tmp_path / "run", "--ckpt_path", "last")[2:]]) == 2
    error_lines = capsys.readouterr().err.strip().split("\n")
    assert "tokens=1.ckpt is damaged" in error_lines[-2] and "there is no whole checkpoint in" in error_lines[-1]


@pytest.mark.parametrize("stalled", [0, 1])
def test_a_stalled_rank_is_named_in_the_error_and_the_other_rank_ends(stalled: int, tmp_path: Path):
    watch = {"class_path": "Watchdog", "init_args": {"minutes": 0.1}}
    (tmp_path / "watched.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [watch, {"class_path": "Checkpoints"}]}}))
    process = start_command(tmp_path / "run", *TWO_RANKS, "-c", str(tmp_path / "watched.yaml"), "--data.init_args.tokens", "100000000")
    deadline = time.monotonic() + 200
    while not (tmp_path / "run" / "config.yaml").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    assert len(children) == 1
    os.kill([process.pid, int(children[0])][stalled], signal.SIGSTOP)
    stopped_at = time.monotonic()
    try:
        while psutil.pid_exists(other_rank := [int(children[0]), process.pid][stalled]) and time.monotonic() - stopped_at < 60:
            if psutil.Process(other_rank).status() == psutil.STATUS_ZOMBIE:
                break
            time.sleep(0.1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the stopped rank keeps the pipes open
    _, stderr = process.communicate()
    assert time.monotonic() - stopped_at < 30
    assert f"no step was made for 6 s, and this run ends: rank {stalled}" in stderr and "was last heard of" in stderr
