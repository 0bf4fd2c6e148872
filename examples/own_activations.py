"""Train a joint SAE on activations of your own, and export it as a SAELens folder.

    python examples/own_activations.py --out my-sae

Here the activations are sums of a few random directions. Replace `activations` by your own tensor, memory map or
DataLoader: anything that yields tensors of shape (batch, d_in) will do.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from lightning import Trainer
from sae_lens import SAE, BatchTopKTrainingSAEConfig
from torch.utils.data import DataLoader

from metasae_lightning import JointSAE
from metasae_lightning.callbacks import Export
from metasae_lightning.penalties import Decomposability


def activations(rows: int, d_in: int, seed: int = 0) -> torch.Tensor:
    """Sums of 3 of 100 fixed unit directions, each with a random positive size."""
    directions = torch.nn.functional.normalize(torch.randn(100, d_in, generator=torch.Generator().manual_seed(0)), dim=-1)
    generator = torch.Generator().manual_seed(seed + 1)
    chosen = torch.randint(100, (rows, 3), generator=generator)
    sizes = torch.rand(rows, 3, generator=generator) + 0.5
    return (sizes[:, :, None] * directions[chosen]).sum(1)


def main(args: list[str] | None = None) -> None:
    """Train for a minute at most, export, and load the folder with SAELens alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("my-sae"))
    parser.add_argument("--rows", type=int, default=100_000, help="training rows")
    options = parser.parse_args(args)

    d_in = 64
    module = JointSAE(
        primary=BatchTopKTrainingSAEConfig(d_in=d_in, d_sae=256, k=3, decoder_init_norm=1.0),
        meta=BatchTopKTrainingSAEConfig(d_in=d_in, d_sae=32, k=4, decoder_init_norm=1.0),
        penalties={"decomposability": Decomposability(weight=0.3, sigma_sq=1.0)},
        primary_optimizer=partial(torch.optim.Adam, lr=3e-3),
    )
    training = DataLoader(activations(options.rows, d_in), batch_size=256, shuffle=True)
    validation = DataLoader(activations(4096, d_in, seed=1), batch_size=512)
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=options.out)
    trainer.callbacks.append(Export())
    trainer.fit(module, training, validation)

    sae = SAE.load_from_disk(options.out / "saes" / "primary")
    held_out = activations(4096, d_in, seed=2)
    with torch.no_grad():
        codes = sae.encode(held_out)
        error = (sae.decode(codes) - held_out).square().sum() / (held_out - held_out.mean(0)).square().sum()
    print(f"{options.out}: L0 {(codes > 0).sum(1).float().mean():.2f}, variance unexplained {error:.3f}")


if __name__ == "__main__":
    main()
