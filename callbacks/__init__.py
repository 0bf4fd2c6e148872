"""Lightning callbacks. They read the results of steps and may end a run, but do not change how an SAE learns. YAML may leave out any."""

from typing import TYPE_CHECKING

from metasae_lightning.lazy_exports import lazy_exports

if TYPE_CHECKING:
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
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Checkpoints": "metasae_lightning.callbacks.checkpoints",
        "Export": "metasae_lightning.callbacks.export",
        "HeldOut": "metasae_lightning.callbacks.held_out",
        "Figures": "metasae_lightning.callbacks.latent_plots",
        "PhiMonitor": "metasae_lightning.callbacks.phi_monitor",
        "StopOnNaN": "metasae_lightning.callbacks.stop_on_nan",
        "Summary": "metasae_lightning.callbacks.summary",
        "Throughput": "metasae_lightning.callbacks.throughput",
        "TokenProgress": "metasae_lightning.callbacks.token_progress",
        "Watchdog": "metasae_lightning.callbacks.watchdog",
    },
)
