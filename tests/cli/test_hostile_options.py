"""Options with values that must fail: every command answers in one line, with a status other than 0, and leaves no folder."""

import contextlib
import io
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metasae_lightning.cli import main
from metasae_lightning.cli.commands import COMMANDS
from metasae_lightning.evaluation.settings import Settings

# No option takes such a value: neither a number, nor one of the allowed words, nor an existing path.
TEXTS = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).map(lambda text: f"¿{text}"),
    st.sampled_from(["¿", "../¿", "[¿", "{¿: [", "!!python/object:os.system ¿", "¿: &a [*a]", "%¿", "¿\n- ¿", "<¿>", "¿" * 300, "hf://¿"]),
)
PLACES = TEXTS.map(lambda text: f"missing/{text}")
NUMBERS = [f"--{name}" for name, field in Settings.__dataclass_fields__.items() if "int" in str(field.type) or "float" in str(field.type)]
LIGHTNING = [
    "--seed_everything",
    "--memory_gib",
    "--grid",
    "--arms",
    "--only",
    "--model",
    "--model.n_p",
    "--model.primary.k",
    "--model.penalties",
    "--model.primary_optimizer",
    "--model.primary_optimizer.lr",
    "--data",
    "--data.tokens",
    "--data.batch_size",
    "--data.model.num_features",
    "--trainer.devices",
    "--trainer.precision",
    "--trainer.max_epochs",
    "--trainer.callbacks",
    "--trainer.logger",
    "--trainer.limit_val_batches",
]
NEEDS_RUN = {
    "evaluate": [["missing"]],
    "test": [["missing"]],
    "calibrate": [["missing"]],
    "compare": [["missing", "missing"]],
    "report": [["missing"]],
    "publish": [["missing", "dest"]],
    "export-dashboard": [["missing"]],
    "saebench": [["missing"]],
    "serve": [["missing"]],
    "judge": [["missing"]],
}
FLAGS = {
    "publish": ["--tokens"],
    "export-dashboard": ["--tokens", "--contexts", "--latents_per_file"],
    "saebench": ["--tokens", "--steps", "--seed", "--evals", "--python"],
    "serve": ["--port"],
    "judge": ["--latents", "--scores", "--explanations", "--judge", "--seeds", "--max_requests", "--timeout", "--pair_cosine", "--splits"],
}


def option(name: str) -> st.SearchStrategy[list[str]]:
    """The words of a command line that must fail: a missing place, a wrong value, or an option that there is not."""
    if name in ("fit", "cache", "validate"):
        recipe = [name, "-c", "synthetic"]
        wrong = st.builds(lambda flag, text: [*recipe, f"{flag}={text}"], st.sampled_from(LIGHTNING), TEXTS)
        return wrong | TEXTS.map(lambda text: [name, "-c", text]) | TEXTS.map(lambda text: [*recipe, f"--{text}"])
    if name in ("recipes", "completion"):
        return TEXTS.map(lambda text: [name, text]) | TEXTS.map(lambda text: [name, f"--{text}=1"])
    places = st.lists(PLACES, min_size=len(NEEDS_RUN[name][0]), max_size=len(NEEDS_RUN[name][0])).map(lambda found: [name, *found])
    words = [name, *NEEDS_RUN[name][0]]
    flags = FLAGS.get(name, NUMBERS)
    wrong = st.builds(lambda flag, text: [*words, f"{flag}={text}"], st.sampled_from(flags), TEXTS)
    return places | TEXTS.map(lambda text: [*words, f"--{text}"]) | (places if name == "report" else wrong)


def answer(words: list[str]) -> tuple[int, str]:
    """The exit status and stderr of a command line, run in an empty folder, in which it leaves nothing."""
    before, error = Path.cwd(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        os.chdir(folder)
        try:
            status = main(words)
        finally:
            os.chdir(before)
        assert not list(Path(folder).iterdir()), f"{words} leaves files"
    return status, error.getvalue()


# METASAE_EXAMPLES=1000 looks longer.
@pytest.mark.parametrize("name", COMMANDS)
@settings(
    max_examples=int(os.environ.get("METASAE_EXAMPLES", "3")), derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(data=st.data())
def test_a_wrong_value_of_any_option_is_one_line_and_leaves_no_folder(name: str, data: st.DataObject):
    words = data.draw(option(name))
    status, error = answer(words)
    assert status == 2, words
    assert error.startswith("metasae: error: ") and error.count("\n") == 1 and error.endswith("\n"), (words, error)
    assert len(error) < 2000
