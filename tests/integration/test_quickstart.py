"""The quickstart recipe on its real, embedded language model."""

import os
from pathlib import Path

import pytest
import torch
from sae_lens import SAE

from metasae_lightning import ActivationsDataModule, functional, run_folder
from metasae_lightning.cli import main
from metasae_lightning.corpora import PythonDocs
from metasae_lightning.lm import HuggingFaceLM

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    """Raw activations of the recipe's test documents, which neither training nor calibration reads."""
    model = HuggingFaceLM("smollm2-135m-instruct", "blocks.15.hook_resid_post")
    sizes = {"tokens": 1024, "batch_size": 1024, "buffer_size": 1024, "test_tokens": 131_072}
    data = ActivationsDataModule(model, PythonDocs(), held_out=0.05, skip_positions=2, max_norm_ratio=10, **sizes)
    data.setup()
    return torch.cat([batch.activations for batch in data.test_dataloader()])


def l0_and_fvu(folder: Path, x: torch.Tensor) -> tuple[float, float]:
    sae = SAE.load_from_disk(folder)
    with torch.no_grad():
        codes = sae.encode(x)
        return (codes > 0).sum(-1).float().mean().item(), functional.fvu(x, sae.decode(codes)).item()


def checked_record(run: Path, x: torch.Tensor, arm: str = "") -> dict[str, float]:
    """The run's validation record, after checks of the exported SAE's L0 and FVU on held-out activations."""
    record = run_folder.arm_record(run_folder.read_record(run / "evaluation.json"), arm)["validation"]
    l0, fvu = l0_and_fvu((run / "arms" / arm if arm else run) / "saes" / "primary", x)
    print(f"{run.name}: on {len(x)} fresh raw tokens L0 {l0:.2f}, FVU {fvu:.4f}; the run reports FVU {record['primary']['fvu']:.4f}")
    assert abs(l0 / 32 - 1) <= 0.02
    assert abs(fvu - record["primary"]["fvu"]) <= 0.01
    return {**record["primary"], "tokens": record["tokens"]}


def test_an_sae_exported_after_fifty_steps_has_the_target_l0_and_the_reported_fvu(held_out: torch.Tensor, tmp_path: Path):
    assert main(["fit", "-c", "quickstart", "-c", "joint", "--run", str(tmp_path / "fifty"), "--data.init_args.tokens", "51200"]) == 0
    checked_record(tmp_path / "fifty", held_out)


def test_the_quickstart_reaches_its_documented_fvu_and_fraction_of_dead_latents(held_out: torch.Tensor, tmp_path: Path):
    run = Path(os.environ.get("QUICKSTART_RUN", tmp_path / "quickstart"))  # a finished run, to save the minutes
    if not run.exists():
        assert main(["fit", "-c", "quickstart", "--run", str(run)]) == 0
    record = checked_record(run, held_out, "joint")
    assert record["tokens"] >= 200_000 and record["fvu"] < 0.3 and record["dead"] < 0.05
    for name in ("primary", "meta"):
        weights = SAE.load_from_disk(run / "arms" / "joint" / "saes" / name).state_dict()
        assert all(torch.isfinite(tensor).all() for tensor in weights.values())
