"""What to watch and when: each callback sees only what a step returned, and can be removed in YAML."""

from metasae_lightning.callbacks.checkpoints import Checkpoints
from metasae_lightning.callbacks.export import Export
from metasae_lightning.callbacks.held_out import HeldOut
from metasae_lightning.callbacks.latent_plots import Figures
from metasae_lightning.callbacks.phi_monitor import PhiMonitor
from metasae_lightning.callbacks.stop_on_nan import StopOnNaN
from metasae_lightning.callbacks.summary import Summary
from metasae_lightning.callbacks.throughput import Throughput
from metasae_lightning.callbacks.token_progress import TokenProgress
from metasae_lightning.callbacks.watchdog import Watchdog

__all__ = ["Checkpoints", "Export", "Figures", "HeldOut", "PhiMonitor", "StopOnNaN", "Summary", "Throughput", "TokenProgress", "Watchdog"]
