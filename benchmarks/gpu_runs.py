"""Tokens a second of whole runs on a language model with random weights: the model alone, this project, and SAELens's runner.

The model has the true architecture of GPT-2 large, the text is random token ids, and nothing is downloaded. A run is timed over a window
of batches in which as many tokens go through the model as are trained on: after its buffer has been filled, before it is drained.
"""

import contextlib
import io
import json
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_model import GPT2_LARGE, TINY, RandomModel, Setting
from gpu_results import Budget, Results, free_memory, print_table, synchronize


class Finished(Exception):
    """Ends a run whose window is over."""


@contextlib.contextmanager
def timed_window(owner: Any, setting: Setting, device: torch.device, *, ends_run: bool) -> Iterator[list[float]]:
    """Note the times at the start and the end of the window, which are counted in calls of `owner.step`."""
    method, calls, times = owner.step, 0, list[float]()

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        result = method(*args, **kwargs)
        calls += 1
        if calls in (setting.warm_up, setting.warm_up + setting.window):
            synchronize(device)
            times.append(time.perf_counter())
            if ends_run and len(times) == 2:
                raise Finished
        return result

    owner.step = step
    try:
        yield times
    finally:
        owner.step = method


class Workplace:
    """A folder with the model, its text, and the runs on them.

    Args:
        setting: What to run.
        device: The device of model and SAE.
        folder: An empty folder.
    """

    def __init__(self, setting: Setting, device: torch.device, folder: Path) -> None:
        self.setting, self.device, self.folder = setting, device, folder
        self.language_model = RandomModel(setting, device, folder)
        self.runs: dict[str, Path] = {}

    def rate(self, times: list[float]) -> float:
        """Tokens a second in the window."""
        if len(times) < 2:
            raise RuntimeError(f"the run ended before step {self.setting.warm_up + self.setting.window}")
        return self.setting.window * self.setting.sae.tokens / (times[1] - times[0])

    def ours(self, name: str) -> float:
        """`metasae fit` of the recipe of the paper's main run, `solo` or `joint`."""
        from metasae_lightning.training import JointSAE

        run = self.folder / name
        with timed_window(JointSAE, self.setting, self.device, ends_run=False) as times:
            command(["fit", "-c", "gpt2_large_l20", "-c", name, "--run", str(run), *self.options(name)])
        self.runs[name] = run
        return self.rate(times)

    def options(self, name: str) -> list[str]:
        """What the command changes in the recipe: its model, text and tokens, in the tiny form all sizes, and on a CPU the precision."""
        setting, sae = self.setting, self.setting.sae
        corpus = {
            "class_path": "metasae_lightning.corpora.SavedDataset",
            "init_args": {"path": self.language_model.corpus, "column": "tokens"},
        }
        # The window ends while the model still reads: the last buffer and what was prepared ahead are trained on after it.
        batches = setting.warm_up + setting.window + setting.buffer // sae.tokens + setting.ahead
        data = {"tokens": batches * sae.tokens, "validation_tokens": 4 * sae.tokens, "test_tokens": setting.test_tokens, "held_out": 0.1}
        model: dict[str, Any] = {}
        trainer: dict[str, Any] = {"val_check_interval": 1.0}
        language_model = {"name": self.language_model.path}
        if setting is TINY:
            data |= {"batch_size": sae.tokens, "context_size": setting.context, "buffer_size": setting.buffer, "forward_batch": 8}
            language_model |= {"hook": f"blocks.{setting.layer}.hook_resid_pre"}
            roles = {"primary": (sae.d_sae, sae.k), "meta": (sae.d_meta, sae.meta_k)}
            for role, (d_sae, k) in roles.items():
                if name == "joint" or role == "primary":
                    model |= {f"{role}.init_args.{key}": value for key, value in {"d_in": sae.d_in, "d_sae": d_sae, "k": k}.items()}
        if self.device.type == "cpu":
            language_model |= {"dtype": "float32", "device": "cpu"}
            trainer |= {"accelerator": "cpu", "precision": "32-true"}
        return [
            f"--data.init_args.corpus={json.dumps(corpus)}",
            *(f"--data.init_args.language_model.init_args.{key}={value}" for key, value in language_model.items()),
            *(f"--data.init_args.{key}={value}" for key, value in data.items()),
            *(f"--model.init_args.{key}={value}" for key, value in model.items()),
            *(f"--trainer.{key}={value}" for key, value in trainer.items()),
        ]

    @property
    def test_options(self) -> list[str]:
        """What `metasae test` changes: nothing, but in the tiny form it trains short critics."""
        return [] if self.setting is GPT2_LARGE else ["--critic_seeds", "1", "--critic_steps", "2", "--resamples", "10"]

    def saelens(self, *, compiled: bool, prefetch: bool = False) -> float:
        """SAELens's training runner with autocast, 128 prompts a pass, pretokenised text, and the same buffer."""
        from datasets import Dataset
        from sae_lens import BatchTopKTrainingSAEConfig, LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
        from sae_lens.load_model import load_model
        from sae_lens.training.sae_trainer import SAETrainer

        setting, sae, device = self.setting, self.setting.sae, str(self.device)
        hook = f"transformer.h.{setting.layer - 1}"  # its output is the residual stream before the hook's layer
        cfg: Any = LanguageModelSAERunnerConfig(
            sae=BatchTopKTrainingSAEConfig(
                d_in=sae.d_in, d_sae=sae.d_sae, k=sae.k, decoder_init_norm=1.0, rescale_acts_by_decoder_norm=False, device=device
            ),
            model_name=self.language_model.path, model_class_name="AutoModelForCausalLM", hook_name=hook, dataset_path="given",
            streaming=False, context_size=setting.context, training_tokens=10**8, train_batch_size_tokens=sae.tokens,
            store_batch_size_prompts=setting.passes[0], n_batches_in_buffer=setting.buffer // setting.context, device=device,
            autocast=True, compile_sae=compiled, prefetch_llm_batches=prefetch, n_checkpoints=0, checkpoint_path=None,
            output_path=None, verbose=False,
            logger=LoggingConfig(log_to_wandb=False),
        )  # fmt: skip
        model = load_model(
            "AutoModelForCausalLM", self.language_model.path, device, {"dtype": self.language_model.dtype}, hook_names=[hook]
        )
        text = Dataset.from_dict({"input_ids": self.language_model.tokens(setting.corpus // setting.context, setting.context).tolist()})
        with timed_window(SAETrainer, setting, self.device, ends_run=True) as times, contextlib.suppress(Finished), quiet(), signals_kept():
            LanguageModelSAETrainingRunner(cfg, override_dataset=text, override_model=model).run()
        return self.rate(times)

    def arms(self) -> dict[str, Callable[[], float]]:
        """The arms of a run by name, the most telling first."""
        first, *others = self.setting.passes
        arms: dict[str, Callable[[], float]] = {f"model alone, {first} contexts a pass": lambda: self.language_model.rate_alone(first)}
        arms |= {"ours, joint": lambda: self.ours("joint"), "ours, solo": lambda: self.ours("solo")}
        if self.device.type == "cuda":
            arms["SAELens, autocast, compiled"] = lambda: self.saelens(compiled=True)
            arms["SAELens, autocast, compiled, prefetch"] = lambda: self.saelens(compiled=True, prefetch=True)
        else:
            arms["SAELens, autocast"] = lambda: self.saelens(compiled=False)
        return arms | {
            f"model alone, {contexts} contexts a pass": (lambda contexts=contexts: self.language_model.rate_alone(contexts))
            for contexts in others
        }


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """Restore the handlers of the signals that SAELens's runner replaces."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def quiet() -> Any:
    """Keep what a program prints out of the benchmark's tables."""
    return contextlib.redirect_stdout(io.StringIO())


def command(words: list[str]) -> None:
    """Run `metasae WORDS` in this process; an error raises."""
    from metasae_lightning.cli import main

    with quiet():
        status = main(words)
    if status:
        raise RuntimeError(f"metasae {words[0]} ended with status {status}")


def run(results: Results, budget: Budget, work: Workplace, size: str) -> None:
    """Measure the tokens a second of every arm, and print them beside the model's and SAELens's best."""
    rates: dict[str, float] = {}
    for arm, measure in work.arms().items():
        if budget.is_over("run"):
            results.skip("run", size, arm, budget.reason("run"))
            continue
        with results.attempt("run", size, arm):
            rates[arm] = measure()
            results.add("run", size, arm, "tokens", round(rates[arm], 1), "a second")
        free_memory(results.device)
    rows: list[list[str]] = []
    best = {name: max((rate for arm, rate in rates.items() if arm.startswith(name)), default=None) for name in ("model", "SAELens")}
    for arm, rate in rates.items():
        cells = [arm, f"{rate:,.0f}"]
        for name, reference in best.items():
            cells.append("" if reference is None else f"{rate / reference:.2f}")
            if reference is not None and arm.startswith("ours"):
                results.add("run", size, arm, f"of {name}'s best", round(rate / reference, 4), "ratio")
        rows.append(cells)
    print_table(f"a whole run, {size}", ["arm", "tokens a second", "of the model's best", "of SAELens's best"], rows)


def run_test(results: Results, budget: Budget, work: Workplace, size: str) -> None:
    """Time `metasae test` of the joint run, which is made where the section `run` has not."""
    arm = "ours, joint"
    if budget.is_over("test"):
        return results.skip("test", size, arm, budget.reason("test"))
    with results.attempt("test", size, arm):
        if "joint" not in work.runs:
            work.ours("joint")
        start = time.perf_counter()
        command(["test", str(work.runs["joint"]), "--tokens", str(work.setting.test_tokens), *work.test_options])
        seconds = time.perf_counter() - start
        results.add("test", size, arm, f"metasae test, {work.setting.test_tokens} tokens", round(seconds, 2), "s")
        print(f"\nmetasae test of the joint run on {work.setting.test_tokens:,} tokens: {seconds:.1f} s", flush=True)


@contextlib.contextmanager
def workplace(device: torch.device, *, tiny: bool) -> Iterator[Workplace]:
    """A workplace in a folder that is removed in the end."""
    with tempfile.TemporaryDirectory() as folder:
        yield Workplace(TINY if tiny else GPT2_LARGE, device, Path(folder))
