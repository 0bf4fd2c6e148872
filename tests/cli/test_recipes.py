"""Every shipped YAML parses, has its documented values, and runs."""

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
# Values from the paper (docs/method.md), or from its author's code where the paper has none.
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
    # Ours, for a GPU.
    "data.forward_batch": 128,
}
RECIPE_VALUES: dict[str, dict[str, Any]] = {
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
    # The SAE has as many latents as there are planted features, and the input size of the synthetic activations.
    "synthetic": {"model.primary.d_in": 64, "model.primary.d_sae": 256, "data.model.hidden_dim": 64, "data.model.num_features": 256},
}
# Values that an overlay sets: penalties by class and weight, whether there is a meta SAE, and n_p and n_m if it sets them.
OVERLAYS: dict[str, tuple[dict[str, tuple[str, float]], bool, tuple[int, int] | None]] = {
    "solo": ({}, False, None),
    "control": ({"decomposability": (DECOMPOSABILITY, 0.0)}, True, None),
    "sequential": ({"decomposability": (DECOMPOSABILITY, 0.0)}, True, (10**9, 1500)),
    "orthogonality": ({"orthogonality": (ORTHOGONALITY, 0.25)}, False, None),
}
WEIGHTS, SIGMAS = (0.1, 0.3, 1.0), (0.3, 1.0, 3.0)
PAPER_ARMS = {"solo", "control", "sequential"} | {f"weight{w}-sigma_sq{s}" for w in WEIGHTS for s in SIGMAS}
# The recipe and the arms of each grid.
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

# Overlays of the quickstart with another primary: the architecture it is exported as, and how many latents it has in place of 4608.
PRIMARIES = {
    "adaptive_elastic_net": ("standard", 4608),
    "paper_gated": ("gated", 4608),
    "signed_gated": ("signed_gated", 2304),
    "sparsemax": ("sparsemax", 4608),
    "subspace": ("subspace", 4608),
}

# Overlays that set where a recipe runs, with every value that they change.
MACHINES: dict[str, dict[str, Any]] = {
    "two_devices": {"data.language_model.device": "own"},
    "one_node": {"trainer.devices": 8, "trainer.strategy": "ddp"},
    "nodes": {"trainer.devices": 8, "trainer.num_nodes": 2, "trainer.strategy": "ddp"},
}


def parsed_config(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, Any]:
    """The full configuration of `metasae fit -c NAME...`; no class is instantiated and no run is started."""
    configs: list[dict[str, Any]] = []
    monkeypatch.setattr(MetasaeCLI, "before_instantiate_classes", lambda self: configs.append(self.config["fit"].as_dict()))
    monkeypatch.setattr(MetasaeCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(MetasaeCLI, "_run_subcommand", lambda self, subcommand: None)
    with torch.random.fork_rng():
        assert main(["fit", *(word for name in names for word in ("-c", name))]) == 0
    return configs[0]


def value_at(config: dict[str, Any], path: str) -> Any:
    """The value at a dotted path without `init_args`."""
    node: Any = config
    for part in path.split("."):
        node = node[part]
        node = node["init_args"] if isinstance(node, dict) and "init_args" in node else node
    return node


def values_at(config: dict[str, Any], paths: Any) -> dict[str, Any]:
    return {path: value_at(config, path) for path in paths}


def test_every_shipped_yaml_is_in_one_of_the_tables_above():
    known = {"joint", "end_to_end", "head", *RECIPE_VALUES, *OVERLAYS, *PRIMARIES, *GRIDS, *MACHINES}
    assert {path.stem for path in RECIPES.iterdir() if path.suffix in (".yaml", ".yml")} == known


@pytest.mark.parametrize("recipe", RECIPE_VALUES)
def test_a_recipe_has_its_documented_values(recipe: str, monkeypatch: pytest.MonkeyPatch):
    config = parsed_config(monkeypatch, recipe, "joint")
    assert values_at(config, RECIPE_VALUES[recipe]) == RECIPE_VALUES[recipe]
    assert {config["model"]["init_args"][sae]["class_path"] for sae in ("primary", "meta")} == {BATCHTOPK}
    assert {config["model"]["init_args"][f"{sae}_optimizer"]["class_path"] for sae in ("primary", "meta")} == {ADAM}
    assert config["run"] == f"runs/{recipe}"


# The number of steps is a multiple of the validation interval, so that the last validation measures the finished SAE.
@pytest.mark.parametrize("recipe", ["gpt2_large_l20", "gemma2_9b_l23"])
def test_the_last_validation_is_after_the_last_step(recipe: str, monkeypatch: pytest.MonkeyPatch):
    config = parsed_config(monkeypatch, recipe)
    batches = value_at(config, "data.tokens") // value_at(config, "data.batch_size")
    assert batches % int(batches * config["trainer"]["val_check_interval"]) == 0


@pytest.mark.parametrize("recipe", ["gpt2_large_l20", "gemma2_9b_l23"])
def test_every_number_of_the_paper_runs_names_its_source(recipe: str):
    comment_above, lines_without_source = "", []
    for line in (RECIPES / f"{recipe}.yaml").read_text().splitlines():
        value, _, comment = line.partition("#")
        has_number = re.search(r"(?<![\w.-])\d[\d_.e+-]*(?![\w-])", value)
        if has_number and not re.search(r"\b(paper|author|SAELens|ours|width|decoder rows)\b", comment or comment_above):
            lines_without_source.append(line)
        comment_above = comment if not value.strip() else ""
    assert not lines_without_source


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("recipe", RECIPE_VALUES)
def test_an_overlay_changes_its_values_in_every_recipe_and_no_others(recipe: str, overlay: str, monkeypatch: pytest.MonkeyPatch):
    without_overlay, with_overlay = parsed_config(monkeypatch, recipe, "joint"), parsed_config(monkeypatch, recipe, overlay)
    penalties, has_meta, phases = OVERLAYS[overlay]
    before, after = without_overlay["model"]["init_args"], with_overlay["model"]["init_args"]
    # The overlay's dict replaces the recipe's, so penalties that only the recipe names are removed.
    assert {name: (penalty["class_path"], penalty["init_args"]["weight"]) for name, penalty in after["penalties"].items()} == penalties
    assert before["meta"] is not None
    assert after["meta"] == (before["meta"] if has_meta else None)
    assert (after["n_p"], after["n_m"]) == (phases or (before["n_p"], before["n_m"]))
    changed = {"penalties", "meta", "n_p", "n_m"}
    assert {k: v for k, v in after.items() if k not in changed} == {k: v for k, v in before.items() if k not in changed}
    assert {k: v for k, v in with_overlay.items() if k not in ("model", "config")} == {
        k: v for k, v in without_overlay.items() if k not in ("model", "config")
    }


@pytest.mark.parametrize("overlay", MACHINES)
@pytest.mark.parametrize("recipe", RECIPE_VALUES)
def test_an_overlay_for_machines_changes_its_values_and_no_others(recipe: str, overlay: str, monkeypatch: pytest.MonkeyPatch):
    changes = MACHINES[overlay]
    if recipe == "synthetic" and "data.language_model.device" in changes:  # synthetic data have no language model
        return
    without_overlay, with_overlay = (
        values_by_path(parsed_config(monkeypatch, recipe)),
        values_by_path(parsed_config(monkeypatch, recipe, overlay)),
    )
    assert {path: value for path, value in with_overlay.items() if value != without_overlay.get(path)} == changes
    assert with_overlay.keys() - without_overlay.keys() <= {"data.language_model.device"}


def values_by_path(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value by its dotted path without `init_args`; without the names of config files and metadata."""
    value_by_path: dict[str, Any] = {}
    for key, value in config.items():
        if key == "init_args" and isinstance(value, dict):
            value_by_path |= values_by_path(value, prefix)
        elif isinstance(value, dict) and value:
            value_by_path |= values_by_path(value, f"{prefix}{key}.")
        elif key not in ("config", "metadata"):
            value_by_path[prefix + key] = value
    return value_by_path


# Each arm of the quickstart equals the overlay of the same name.
def test_the_quickstarts_three_arms_equal_the_overlays_of_their_names(monkeypatch: pytest.MonkeyPatch):
    arms = parsed_config(monkeypatch, "quickstart")["model"]["init_args"]["arms"]
    assert list(arms) == ["solo", "joint", "control"]
    for name, arm in arms.items():
        assert without_metadata(arm["init_args"]) == without_metadata(parsed_config(monkeypatch, "quickstart", name)["model"]["init_args"])


@pytest.mark.parametrize("grid", GRIDS)
def test_arms_of_a_grid_differ_from_the_recipe_in_the_values_of_their_names_only(grid: str, monkeypatch: pytest.MonkeyPatch):
    recipe, names = GRIDS[grid]
    control_args = parsed_config(monkeypatch, recipe, "control")["model"]["init_args"]
    grid_model = parsed_config(monkeypatch, recipe, grid)["model"]
    assert grid_model["class_path"].endswith("SideBySide") and grid_model["init_args"]["arms"].keys() == names
    for name, arm in grid_model["init_args"]["arms"].items():
        arm_args, penalty_args = arm["init_args"], arm["init_args"]["penalties"].get("decomposability", {}).get("init_args", {})
        assert {k: v for k, v in without_metadata(arm_args).items() if k not in CHANGED_BY_ARMS} == {
            k: v for k, v in without_metadata(control_args).items() if k not in CHANGED_BY_ARMS
        }, name
        assert arm_args["seed"] == int(name.rpartition("seed")[2] if "seed" in name else 0)
        for part in name.split("-"):
            key, value = re.fullmatch(r"([a-z_]+)([\d.]*)", part).groups()  # type: ignore[union-attr]
            assert key in {*OVERLAYS, "joint"} or {**penalty_args, "seed": arm_args["seed"]}[key] == float(value)


CHANGED_BY_ARMS = {"penalties", "meta", "n_p", "n_m", "seed"}


def without_metadata(arguments: dict[str, Any]) -> dict[str, Any]:
    """A model's arguments without the metadata that SAELens adds to SAE configs."""
    saes = {role: arguments[role] for role in ("primary", "meta") if arguments[role] is not None}
    return {
        **arguments,
        **{role: {**sae_config, "init_args": {**sae_config["init_args"], "metadata": None}} for role, sae_config in saes.items()},
    }


def fit(run: Path, *names: str, **overrides: Any) -> dict[str, Any]:
    """Run `metasae fit` and return the state dict of its last checkpoint. In keywords, `__` stands for `.init_args.`."""
    configs = [word for name in names for word in ("-c", name)]
    flags = [word for key, value in overrides.items() for word in (f"--{key.replace('__', '.init_args.')}", str(value))]
    assert main(["fit", *configs, "--run", str(run), *flags]) == 0
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=False, mmap=True)["state_dict"]


def short_run(batches: int, batch_size: int, *, validation: int) -> dict[str, Any]:
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


# Solo, control and sequential have equal primaries; control also trains a meta SAE, sequential trains it at the end only. Orthogonality
# must differ.
def test_overlays_train_equal_primaries_and_their_meta_steps(tmp_path: Path):
    size = short_run(12, 512, validation=2048)
    state_by_overlay = {overlay: fit(tmp_path / overlay, "synthetic", overlay, **size) for overlay in OVERLAYS}
    primaries = {overlay: {k: v for k, v in state.items() if k.startswith("primary.")} for overlay, state in state_by_overlay.items()}
    assert int(state_by_overlay["solo"]["primary.steps"]) == 12
    for overlay in ("control", "sequential"):
        assert all(torch.equal(value, primaries["solo"][name]) for name, value in primaries[overlay].items())
    assert not torch.equal(primaries["orthogonality"]["primary.sae.W_dec"], primaries["solo"]["primary.sae.W_dec"])
    # 12 steps are one macro-step of 10 and a partial one, 5 meta steps each.
    steps = {overlay: int(state["meta.steps"]) if "meta.steps" in state else None for overlay, state in state_by_overlay.items()}
    assert steps == {"solo": None, "control": 10, "sequential": 1500, "orthogonality": None}


# The architecture of the recipe's model with the recipe's hook, at width 32.
@pytest.mark.parametrize(
    ("recipe", "architecture", "layers"), [("gpt2_large_l20", "gpt2", 21), ("gemma2_9b_l23", "gemma2", 24), ("quickstart", "llama", 16)]
)
def test_recipes_run_on_tiny_models_of_their_architecture(recipe: str, architecture: str, layers: int, tmp_path: Path, texts: str):
    state = fit(
        tmp_path / "run",
        recipe,
        "joint",
        **short_run(12, 256, validation=256),
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
    assert (int(state["primary.steps"]), int(state["meta.steps"])) == (12, 10)
    assert_finished(tmp_path / "run", state, d_in=32, d_sae=256, k=recipe_k(recipe), meta=40)


# Every shipped YAML must run: the arms differ in the objective alone, and all train on contexts.
def test_the_end_to_end_overlay_trains_its_three_arms(tmp_path: Path, texts: str):
    state = fit(
        tmp_path / "run",
        "quickstart",
        "end_to_end",
        **short_run(3, 256, validation=256),
        data__language_model__name=save_model(tmp_path / "model", "llama", layers=17),
        data__corpus=texts,
        data__context_size=64,
        data__held_out=0.1,
        model__primary__d_in=32,
        model__primary__d_sae=64,
        model__primary__k=4,
    )
    steps = {name: int(state[f"_arms.arm_{name}.primary.steps"]) for name in END_TO_END_ARMS}
    assert steps == dict.fromkeys(END_TO_END_ARMS, 3)
    decoders = [state[f"_arms.arm_{name}.primary.sae.W_dec"] for name in END_TO_END_ARMS]
    assert not torch.equal(decoders[0], decoders[1]) and not torch.equal(decoders[1], decoders[2])


# Every shipped YAML must run: the overlay adds a head, which the checkpoint has and the exported SAE has not.
def test_the_head_overlay_trains_and_saves_a_head(tmp_path: Path):
    state = fit(tmp_path / "run", "synthetic", "head", **short_run(4, 256, validation=256))
    assert state["primary.head.embeddings"].shape == (256, 16) and state["primary.head.map.2.weight"].abs().max() > 0
    saes = tmp_path / "run" / "saes"
    assert (saes / "head" / "head.safetensors").exists()
    assert SAE.load_from_disk(saes / "primary").state_dict().keys() == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}


END_TO_END_ARMS = ("local", "kl", "kl_downstream")


@pytest.mark.parametrize("overlay", PRIMARIES)
def test_an_overlay_with_another_primary_trains_and_is_tested(overlay: str, tmp_path: Path, texts: str, monkeypatch: Any):
    architecture, d_sae = PRIMARIES[overlay]
    with monkeypatch.context() as patches:
        config = parsed_config(patches, "quickstart", overlay, "joint")
    assert value_at(config, "model.primary.d_sae") == d_sae and value_at(config, "model.primary.normalize_activations") == "layer_norm"
    fit(
        tmp_path / "run",
        *("quickstart", overlay, "joint"),
        **short_run(12, 256, validation=256),
        model__primary__d_in=32,
        model__primary__d_sae=60,
        model__meta__d_in=32,
        model__meta__d_sae=20,
        data__language_model__name=save_model(tmp_path / "model", "llama", layers=16),
        data__corpus=texts,
        data__context_size=64,
        data__forward_batch=4,
        data__buffer_size=512,
        data__held_out=0.1,
        data__test_tokens=512,
    )
    loaded = SAE.load_from_disk(str(tmp_path / "run" / "saes" / "primary"))
    assert loaded.cfg.architecture() == architecture and loaded.cfg.d_sae == 60 and loaded.W_dec.isfinite().all()
    signs = ["--by_polarity=true"] if overlay in ("signed_gated", "sparsemax") else []
    assert main(["test", str(tmp_path / "run"), "--critic_seeds=0", "--splice_tokens=64", "--resamples=5", *signs]) == 0


def recipe_k(recipe: str) -> int:
    return RECIPE_VALUES[recipe]["model.primary.k"]


def assert_finished(run: Path, state: dict[str, Any], *, d_in: int, d_sae: int, k: int, meta: int) -> None:
    """Assert finite values, decoder rows of unit norm, and exported SAEs that SAELens loads, with the recipe's L0."""
    assert all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point())
    assert (state["primary.sae.W_dec"].norm(dim=-1) - 1).abs().max() < 1e-6
    record = json.loads((run / "evaluation.json").read_text())["validation"]
    assert all(math.isfinite(value) for value in [*record["primary"].values(), *record["meta"].values(), *record["penalties"].values()])
    assert 0 < record["penalties"]["decomposability"] <= 1
    assert record["exported"]["primary"]["l0"] == pytest.approx(k, rel=0.02)
    primary, critic = (SAE.load_from_disk(run / "saes" / name) for name in ("primary", "meta"))
    assert (primary.cfg.d_in, primary.cfg.d_sae, primary.cfg.normalize_activations) == (d_in, d_sae, "layer_norm")
    assert (critic.cfg.d_in, critic.cfg.d_sae) == (d_in, meta)
    assert primary.decode(primary.encode(torch.randn(2, d_in, generator=torch.Generator().manual_seed(0)))).isfinite().all()


def save_at_true_width(folder: Path, kind: Any, config: PretrainedConfig) -> Path:
    """Save a model with random weights in bfloat16, which take half the disk space of float32."""
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
def large_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for gigabytes, removed after the test; pytest would keep it for three more sessions."""
    yield tmp_path
    shutil.rmtree(tmp_path)


ON_CPU: dict[str, Any] = {"trainer.accelerator": "cpu", "trainer.precision": "32-true", "data__language_model__dtype": "float32"}


# The recipe with another model folder, corpus and length, on a CPU.
@pytest.mark.slow
def test_the_gpt2_large_recipe_runs_at_full_size(large_folder: Path, texts: str):
    # The hub's config of gpt2-large.
    config = GPT2Config(n_embd=1280, n_layer=36, n_head=20, vocab_size=50257, n_positions=1024, n_ctx=1024, bos_token_id=0, eos_token_id=1)
    state = fit(
        large_folder / "run",
        "gpt2_large_l20",
        **short_run(11, 256, validation=512),
        **ON_CPU,
        data__language_model__name=save_at_true_width(large_folder / "model", GPT2LMHeadModel, config),
        data__corpus=texts,
        data__buffer_size=512,
        data__forward_batch=4,
        data__held_out=0.1,
        **{"trainer.val_check_interval": 1.0},
    )
    assert (int(state["primary.steps"]), int(state["meta.steps"])) == (11, 10)
    assert_finished(large_folder / "run", state, d_in=1280, d_sae=20_480, k=64, meta=1800)


# Full width, 3 of 42 layers. A CPU's memory and time permit a quarter of the recipe's primary and a narrow meta SAE: one forward pass of
# the recipe's own critic takes 4 * 65536 * 3584 * 5760 = 5e12 operations.
@pytest.mark.slow
def test_the_gemma_2_recipe_runs_at_full_width(large_folder: Path, texts: str):
    # The hub's config of google/gemma-2-9b.
    widths = {"hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256}
    other_sizes = {"vocab_size": 256_000, "query_pre_attn_scalar": 256, "sliding_window": 4096, "max_position_embeddings": 8192}
    config = Gemma2Config(num_hidden_layers=3, bos_token_id=0, eos_token_id=1, pad_token_id=0, **widths, **other_sizes)
    state = fit(
        large_folder / "run",
        "gemma2_9b_l23",
        **short_run(11, 128, validation=256),
        **ON_CPU | {"data__language_model__dtype": "bfloat16"},
        model__primary__d_sae=16_384,
        model__meta__d_sae=256,
        data__language_model__name=save_at_true_width(large_folder / "model", Gemma2ForCausalLM, config),
        data__language_model__hook="blocks.2.hook_resid_pre",
        data__corpus=texts,
        data__buffer_size=512,
        data__forward_batch=4,
        data__held_out=0.1,
        **{"trainer.val_check_interval": 1.0},
    )
    assert (int(state["primary.steps"]), int(state["meta.steps"])) == (11, 10)
    assert_finished(large_folder / "run", state, d_in=3584, d_sae=16_384, k=100, meta=256)
