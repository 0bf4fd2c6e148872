"""Every shipped YAML: it parses, it says what it should, and it runs."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, PretrainedConfig

from metasae_lightning.cli import main
from metasae_lightning.cli.lightning_cli import MetasaeCLI
from metasae_lightning.cli.recipes import RECIPES
from tests.helpers.models import documents, save_model, tokenizer

# lightning 2.6 passes `skip_none`, which jsonargparse 4.53 deprecates: https://github.com/Lightning-AI/pytorch-lightning
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

BATCHTOPK, ADAM = "sae_lens.BatchTopKTrainingSAEConfig", "torch.optim.Adam"
DECOMPOSABILITY, ORTHOGONALITY = (f"metasae_lightning.penalties.{name}" for name in ("Decomposability", "Orthogonality"))
# Where the paper speaks these are its numbers (docs/method.md), elsewhere those of its author's code.
BOTH_PAPER_RUNS: dict[str, Any] = {
    **{f"model.{sae}.normalize_activations": "layer_norm" for sae in ("primary", "meta")},
    **{f"model.{sae}.decoder_init_norm": 1.0 for sae in ("primary", "meta")},
    **{f"model.{sae}.rescale_acts_by_decoder_norm": False for sae in ("primary", "meta")},
    **{f"model.{sae}.aux_loss_coefficient": 1 / 32 for sae in ("primary", "meta")},
    **{f"model.{sae}_optimizer.lr": 3e-4 for sae in ("primary", "meta")},
    **{f"model.{sae}_optimizer.betas": (0.9, 0.99) for sae in ("primary", "meta")},
    **{f"model.{sae}_scheduler": None for sae in ("primary", "meta")},
    "model.meta.k": 8,
    "model.penalties.decomposability.weight": 0.3,
    "model.penalties.decomposability.sigma_sq": 1.0,
    "model.n_p": 10,
    "model.n_m": 5,
    "model.decoder_rows": "unit",
    "model.b_dec_init": "zeros",
    "model.clip_grad_norm": None,
    "model.micro_batches": 1,
    "model.dead_after_tokens": 5 * 4096,
    "model.meta_dead_after_steps": 5,
    "data.corpus.path": "HuggingFaceFW/fineweb",
    "data.corpus.name": "sample-10BT",
    "data.batch_size": 4096,
    "data.context_size": 128,
}
NUMBERS: dict[str, dict[str, Any]] = {
    "gpt2_large_l20": BOTH_PAPER_RUNS
    | {
        "data.language_model.name": "gpt2-large",
        "data.language_model.hook": "blocks.20.hook_resid_pre",
        **{f"model.{sae}.d_in": 1280 for sae in ("primary", "meta")},
        "model.primary.d_sae": 20_480,
        "model.primary.k": 64,
        "model.meta.d_sae": 1800,
        "data.tokens": 100_000_000,
    },
    "gemma2_9b_l23": BOTH_PAPER_RUNS
    | {
        "data.language_model.name": "google/gemma-2-9b",
        "data.language_model.hook": "blocks.23.hook_resid_pre",
        **{f"model.{sae}.d_in": 3584 for sae in ("primary", "meta")},
        "model.primary.d_sae": 65_536,
        "model.primary.k": 100,
        "model.meta.d_sae": 65_536 * 1800 // 20_480,
        "data.tokens": 75_000_000 + 300_000_000,
    },
    "quickstart": {
        "data.language_model.name": "smollm2-135m-instruct",
        **{f"model.{sae}.d_in": 576 for sae in ("primary", "meta")},
        "model.primary.d_sae": 4608,
        "model.primary.k": 32,
        "model.n_p": 10,
        "model.n_m": 5,
    },
    # The SAE is as wide as the planted features are many, and reads what is planted.
    "synthetic": {"model.primary.d_in": 64, "model.primary.d_sae": 256, "data.model.hidden_dim": 64, "data.model.num_features": 256},
}
# What an overlay makes of a recipe: its penalties by class and weight, whether a meta SAE is left, and n_p and n_m where it sets them.
OVERLAYS: dict[str, tuple[dict[str, tuple[str, float]], bool, tuple[int, int] | None]] = {
    "solo": ({}, False, None),
    "control": ({"decomposability": (DECOMPOSABILITY, 0.0)}, True, None),
    "sequential": ({"decomposability": (DECOMPOSABILITY, 0.0)}, True, (10**9, 1500)),
    "orthogonality": ({"orthogonality": (ORTHOGONALITY, 0.25)}, False, None),
}
WEIGHTS, SIGMAS = (0.1, 0.3, 1.0), (0.3, 1.0, 3.0)
PAPER_ARMS = {"solo", "control", "sequential"} | {f"weight{w}-sigma_sq{s}" for w in WEIGHTS for s in SIGMAS}
# The arms that a grid makes of a recipe.
GRIDS: dict[str, tuple[str, set[str]]] = {
    "paper_grid": ("gpt2_large_l20", PAPER_ARMS),
    "quickstart_grid": ("quickstart", {f"{name}-seed{seed}" for name in PAPER_ARMS for seed in range(3)}),
    "quickstart_seeds": (
        "quickstart",
        {f"{name}-seed{seed}" for name in ("solo", "joint", "control", "orthogonality") for seed in range(3)},
    ),
    "synthetic_grid": (
        "synthetic",
        {f"{name}-seed{seed}" for name in ("solo", "orthogonality", "weight0.015", "weight0.05", "weight0.15") for seed in range(5)},
    ),
}

# Where a recipe runs: all that such an overlay changes.
MACHINES: dict[str, dict[str, Any]] = {
    "two_devices": {"data.language_model.device": "own"},
    "one_node": {"trainer.devices": 8, "trainer.strategy": "ddp"},
    "nodes": {"trainer.devices": 8, "trainer.num_nodes": 2, "trainer.strategy": "ddp"},
}


def parsed(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, Any]:
    """The whole configuration that `metasae fit -c NAME...` comes to; nothing is built and nothing is run."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(MetasaeCLI, "before_instantiate_classes", lambda self: seen.append(self.config["fit"].as_dict()))
    monkeypatch.setattr(MetasaeCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(MetasaeCLI, "_run_subcommand", lambda self, subcommand: None)
    with torch.random.fork_rng():
        assert main(["fit", *(word for name in names for word in ("-c", name))]) == 0
    return seen[0]


def at(config: dict[str, Any], path: str) -> Any:
    """A dotted path's value, `init_args` understood."""
    node: Any = config
    for part in path.split("."):
        node = node[part]
        node = node["init_args"] if isinstance(node, dict) and "init_args" in node else node
    return node


def found(config: dict[str, Any], paths: Any) -> dict[str, Any]:
    return {path: at(config, path) for path in paths}


def test_every_shipped_yaml_is_tested_here():
    known = {"joint", *NUMBERS, *OVERLAYS, *GRIDS, *MACHINES}
    assert {path.stem for path in RECIPES.iterdir() if path.suffix in (".yaml", ".yml")} == known


@pytest.mark.parametrize("recipe", NUMBERS)
def test_a_recipe_has_its_numbers(recipe: str, monkeypatch: pytest.MonkeyPatch):
    config = parsed(monkeypatch, recipe, "joint")
    assert found(config, NUMBERS[recipe]) == NUMBERS[recipe]
    assert {config["model"]["init_args"][sae]["class_path"] for sae in ("primary", "meta")} == {BATCHTOPK}
    assert {config["model"]["init_args"][f"{sae}_optimizer"]["class_path"] for sae in ("primary", "meta")} == {ADAM}
    assert config["run"] == f"runs/{recipe}"


# As many steps of the run as the budget holds come in whole validation intervals, so that the last one sees the finished SAE.
@pytest.mark.parametrize("recipe", ["gpt2_large_l20", "gemma2_9b_l23"])
def test_the_last_validation_is_at_the_end(recipe: str, monkeypatch: pytest.MonkeyPatch):
    config = parsed(monkeypatch, recipe)
    batches = at(config, "data.tokens") // at(config, "data.batch_size")
    assert batches % int(batches * config["trainer"]["val_check_interval"]) == 0


@pytest.mark.parametrize("recipe", ["gpt2_large_l20", "gemma2_9b_l23"])
def test_every_number_of_the_paper_runs_names_its_source(recipe: str):
    above, silent = "", []
    for line in (RECIPES / f"{recipe}.yaml").read_text().splitlines():
        value, _, comment = line.partition("#")
        numbered = re.search(r"(?<![\w.-])\d[\d_.e+-]*(?![\w-])", value)
        if numbered and not re.search(r"\b(paper|author|SAELens|ours|width|decoder rows)\b", comment or above):
            silent.append(line)
        above = comment if not value.strip() else ""
    assert not silent


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("recipe", NUMBERS)
def test_an_overlay_does_what_it_says_to_every_recipe_and_nothing_else(recipe: str, overlay: str, monkeypatch: pytest.MonkeyPatch):
    plain, laid = parsed(monkeypatch, recipe, "joint"), parsed(monkeypatch, recipe, overlay)
    penalties, has_meta, phases = OVERLAYS[overlay]
    before, after = plain["model"]["init_args"], laid["model"]["init_args"]
    # The second file replaces the dict: a penalty of the recipe that it does not name is gone.
    assert {name: (p["class_path"], p["init_args"]["weight"]) for name, p in after["penalties"].items()} == penalties
    assert before["meta"] is not None
    assert after["meta"] == (before["meta"] if has_meta else None)
    assert (after["n_p"], after["n_m"]) == (phases or (before["n_p"], before["n_m"]))
    touched = {"penalties", "meta", "n_p", "n_m"}
    assert {k: v for k, v in after.items() if k not in touched} == {k: v for k, v in before.items() if k not in touched}
    assert {k: v for k, v in laid.items() if k not in ("model", "config")} == {
        k: v for k, v in plain.items() if k not in ("model", "config")
    }


@pytest.mark.parametrize("overlay", MACHINES)
@pytest.mark.parametrize("recipe", NUMBERS)
def test_where_a_recipe_runs_is_all_that_such_an_overlay_changes(recipe: str, overlay: str, monkeypatch: pytest.MonkeyPatch):
    changes = MACHINES[overlay]
    if recipe == "synthetic" and "data.language_model.device" in changes:  # planted data have no model
        return
    plain, laid = flat(parsed(monkeypatch, recipe)), flat(parsed(monkeypatch, recipe, overlay))
    assert {path: value for path, value in laid.items() if value != plain.get(path)} == changes
    assert laid.keys() - plain.keys() <= {"data.language_model.device"}


def flat(config: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Every value under its dotted path, `init_args` left out; not which files it is from."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key == "init_args" and isinstance(value, dict):
            found |= flat(value, before)
        elif isinstance(value, dict) and value:
            found |= flat(value, f"{before}{key}.")
        elif key not in ("config", "metadata"):
            found[before + key] = value
    return found


# What the quickstart trains side by side is what the overlays of the same names train alone.
def test_the_quickstart_has_three_arms(monkeypatch: pytest.MonkeyPatch):
    arms = parsed(monkeypatch, "quickstart")["model"]["init_args"]["arms"]
    assert list(arms) == ["solo", "joint", "control"]
    for name, arm in arms.items():
        assert told(arm["init_args"]) == told(parsed(monkeypatch, "quickstart", name)["model"]["init_args"])


@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_is_the_recipe_with_one_thing_changed_in_each_arm(grid: str, monkeypatch: pytest.MonkeyPatch):
    recipe, names = GRIDS[grid]
    plain = parsed(monkeypatch, recipe, "control")["model"]["init_args"]
    laid = parsed(monkeypatch, recipe, grid)["model"]
    assert laid["class_path"].endswith("SideBySide") and laid["init_args"]["arms"].keys() == names
    for name, arm in laid["init_args"]["arms"].items():
        own, of_penalty = arm["init_args"], arm["init_args"]["penalties"].get("decomposability", {}).get("init_args", {})
        assert {k: v for k, v in told(own).items() if k not in TOUCHED} == {k: v for k, v in told(plain).items() if k not in TOUCHED}, name
        assert own["seed"] == int(name.rpartition("seed")[2] if "seed" in name else 0)
        for part in name.split("-"):
            key, value = re.fullmatch(r"([a-z_]+)([\d.]*)", part).groups()  # type: ignore[union-attr]
            assert key in {*OVERLAYS, "joint"} or {**of_penalty, "seed": own["seed"]}[key] == float(value)


TOUCHED = {"penalties", "meta", "n_p", "n_m", "seed"}


def told(arguments: dict[str, Any]) -> dict[str, Any]:
    """A model's arguments without what SAELens writes into a config's record by itself."""
    both = {role: arguments[role] for role in ("primary", "meta") if arguments[role] is not None}
    return {**arguments, **{role: {**one, "init_args": {**one["init_args"], "metadata": None}} for role, one in both.items()}}


def fit(run: Path, *names: str, **overrides: Any) -> dict[str, Any]:
    """A real `metasae fit`; returns what the finished run's checkpoint holds. In a keyword, `__` stands for `.init_args.`."""
    configs = [word for name in names for word in ("-c", name)]
    flags = [word for key, value in overrides.items() for word in (f"--{key.replace('__', '.init_args.')}", str(value))]
    assert main(["fit", *configs, "--run", str(run), *flags]) == 0
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=False, mmap=True)["state_dict"]


def short(batches: int, batch_size: int, *, validation: int) -> dict[str, Any]:
    return {
        "data__tokens": batches * batch_size,
        "data__batch_size": batch_size,
        "data__validation_tokens": validation,
    }


@pytest.fixture
def texts(tmp_path: Path) -> str:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "all.txt").write_text("\n\n".join(documents(1000)))
    return json.dumps({"class_path": "metasae_lightning.corpora.TextFiles", "init_args": {"paths": str(tmp_path / "texts")}})


# Solo and control differ in nothing but the meta SAE beside; sequential's primary is the same again, its meta SAE trained at the end
# and only there; orthogonality is the control that must differ.
def test_overlays_run(tmp_path: Path):
    size = short(12, 512, validation=2048)
    ends = {overlay: fit(tmp_path / overlay, "synthetic", overlay, **size) for overlay in OVERLAYS}
    primaries = {overlay: {k: v for k, v in end.items() if k.startswith("primary.")} for overlay, end in ends.items()}
    assert int(ends["solo"]["primary.steps"]) == 12
    for overlay in ("control", "sequential"):
        assert all(torch.equal(value, primaries["solo"][name]) for name, value in primaries[overlay].items())
    assert not torch.equal(primaries["orthogonality"]["primary.sae.W_dec"], primaries["solo"]["primary.sae.W_dec"])
    # 12 steps are one macro-step of 10 and a partial one, 5 meta steps each.
    steps = {overlay: int(end["meta.steps"]) if "meta.steps" in end else None for overlay, end in ends.items()}
    assert steps == {"solo": None, "control": 10, "sequential": 1500, "orthogonality": None}


# The architecture of the recipe's model and the recipe's own hook, 32 wide.
@pytest.mark.parametrize(
    ("recipe", "architecture", "layers"), [("gpt2_large_l20", "gpt2", 21), ("gemma2_9b_l23", "gemma2", 24), ("quickstart", "llama", 16)]
)
def test_recipes_run_on_tiny_models_of_their_architecture(recipe: str, architecture: str, layers: int, tmp_path: Path, texts: str):
    end = fit(
        tmp_path / "run",
        recipe,
        "joint",
        **short(12, 256, validation=256),
        model__primary__d_in=32,
        model__primary__d_sae=256,
        model__meta__d_in=32,
        model__meta__d_sae=40,
        data__language_model__name=save_model(tmp_path / "model", architecture, layers=layers),
        data__corpus=texts,
        data__context_size=64,
        data__forward_batch=4,
        data__buffer_size=512,
        data__held_out=0.1,
        **{"trainer.accelerator": "cpu"},
    )
    assert (int(end["primary.steps"]), int(end["meta.steps"])) == (12, 10)
    assert_finished(tmp_path / "run", end, d_in=32, d_sae=256, k=at_k(recipe), meta=40)


def at_k(recipe: str) -> int:
    return NUMBERS[recipe]["model.primary.k"]


def assert_finished(run: Path, end: dict[str, Any], *, d_in: int, d_sae: int, k: int, meta: int) -> None:
    """All numbers finite, rows unit, and both folders SAELens's to read, at the recipe's sparsity."""
    assert all(torch.isfinite(value).all() for value in end.values() if value.is_floating_point())
    assert (end["primary.sae.W_dec"].norm(dim=-1) - 1).abs().max() < 1e-6
    record = json.loads((run / "evaluation.json").read_text())["validation"]
    assert all(math.isfinite(value) for value in [*record["primary"].values(), *record["meta"].values(), *record["penalties"].values()])
    assert 0 < record["penalties"]["decomposability"] <= 1
    assert record["exported"]["primary"]["l0"] == pytest.approx(k, rel=0.02)
    primary, critic = (SAE.load_from_disk(run / "saes" / name) for name in ("primary", "meta"))
    assert (primary.cfg.d_in, primary.cfg.d_sae, primary.cfg.normalize_activations) == (d_in, d_sae, "layer_norm")
    assert (critic.cfg.d_in, critic.cfg.d_sae) == (d_in, meta)
    assert primary.decode(primary.encode(torch.randn(2, d_in, generator=torch.Generator().manual_seed(0)))).isfinite().all()


def save_at_true_width(folder: Path, kind: Any, config: PretrainedConfig) -> Path:
    """Random weights in bfloat16, which are half the disk."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            kind(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(default)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[Path]:
    """A folder for gigabytes, which pytest would keep for three more sessions."""
    yield tmp_path
    shutil.rmtree(tmp_path)


ON_CPU: dict[str, Any] = {"trainer.accelerator": "cpu", "trainer.precision": "32-true", "data__language_model__dtype": "float32"}


# The recipe as it is, but for where its model and text lie, how long it runs and that it runs on a CPU.
@pytest.mark.slow
def test_gpt2_large_at_its_true_size(roomy: Path, texts: str):
    # The hub's config of gpt2-large.
    config = GPT2Config(n_embd=1280, n_layer=36, n_head=20, vocab_size=50257, n_positions=1024, n_ctx=1024, bos_token_id=0, eos_token_id=1)
    end = fit(
        roomy / "run",
        "gpt2_large_l20",
        **short(11, 256, validation=512),
        **ON_CPU,
        data__language_model__name=save_at_true_width(roomy / "model", GPT2LMHeadModel, config),
        data__corpus=texts,
        data__buffer_size=512,
        data__forward_batch=4,
        data__held_out=0.1,
        **{"trainer.val_check_interval": 1.0},
    )
    assert (int(end["primary.steps"]), int(end["meta.steps"])) == (11, 10)
    assert_finished(roomy / "run", end, d_in=1280, d_sae=20_480, k=64, meta=1800)


# True widths, 3 of 42 layers. A CPU's memory and time allow a quarter of the recipe's primary and a narrow meta SAE: one evaluation of
# the recipe's own critic is 4 * 65536 * 3584 * 5760 = 5e12 operations.
@pytest.mark.slow
def test_gemma_2_at_its_true_width(roomy: Path, texts: str):
    # The hub's config of google/gemma-2-9b.
    widths = {"hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256}
    rest = {"vocab_size": 256_000, "query_pre_attn_scalar": 256, "sliding_window": 4096, "max_position_embeddings": 8192}
    config = Gemma2Config(num_hidden_layers=3, bos_token_id=0, eos_token_id=1, pad_token_id=0, **widths, **rest)
    end = fit(
        roomy / "run",
        "gemma2_9b_l23",
        **short(11, 128, validation=256),
        **ON_CPU | {"data__language_model__dtype": "bfloat16"},
        model__primary__d_sae=16_384,
        model__meta__d_sae=256,
        data__language_model__name=save_at_true_width(roomy / "model", Gemma2ForCausalLM, config),
        data__language_model__hook="blocks.2.hook_resid_pre",
        data__corpus=texts,
        data__buffer_size=512,
        data__forward_batch=4,
        data__held_out=0.1,
        **{"trainer.val_check_interval": 1.0},
    )
    assert (int(end["primary.steps"]), int(end["meta.steps"])) == (11, 10)
    assert_finished(roomy / "run", end, d_in=3584, d_sae=16_384, k=100, meta=256)
