"""Where a rank's language model lies, what is refused, and that batches come to where the SAE is."""

import contextlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from metasae_lightning.cli import main
from metasae_lightning.data import ActivationsDataModule
from metasae_lightning.data.activation_stream import ActivationStream
from metasae_lightning.errors import InputError
from metasae_lightning.lm import HuggingFaceLM, device
from metasae_lightning.lm.device import assign_device, parse_device, spare_gpus
from tests.data.test_stream import batches, same, stream
from tests.helpers.models import Texts, documents, save_model

# lightning 2.6 passes `skip_none`, which jsonargparse 4.53 deprecates: https://github.com/Lightning-AI/pytorch-lightning
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("placement") / "tiny", "llama", layers=2))


@pytest.fixture(scope="module")
def lm(folder: str) -> HuggingFaceLM:
    model = HuggingFaceLM(folder, "blocks.1.hook_resid_post", device="cpu")
    model.load()
    return model


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda there: monkeypatch.setattr(device, "count_gpus", lambda: there)


def ranks(*numbers: int, rank: int = 0) -> Any:
    devices = [torch.device("cuda", number) for number in numbers]
    return SimpleNamespace(root_device=devices[rank], parallel_devices=devices, local_rank=rank)


# Eight GPUs, four SAEs on the first four: their models lie on the last four, in the order of ranks.
@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize(("asked", "numbers"), [("own", [4, 5, 6, 7]), ("auto", [0, 1, 2, 3]), ("cuda", [0, 1, 2, 3]), ("cpu", [None] * 4)])
def test_each_rank_has_its_own(asked: str, numbers: list[int | None], rank: int, machine: Any):
    machine(8)
    assert assign_device(asked, ranks(0, 1, 2, 3, rank=rank)).index == numbers[rank]


# One process has what is named; its own is the first that the SAE is not on; a CPU's SAE may have a model on the first GPU.
@pytest.mark.parametrize(("asked", "home", "there"), [("cuda:1", 0, 1), ("cuda:0", 0, 0), ("own", 0, 1), ("own", 1, 0), ("own", None, 0)])
def test_one_rank_has_what_it_asks_for(asked: str, home: int | None, there: int, machine: Any):
    machine(2)
    one = SimpleNamespace(root_device=CPU if home is None else torch.device("cuda", home))
    assert assign_device(asked, one) == torch.device("cuda", there)


@pytest.mark.parametrize(
    ("there", "used", "says"),
    [
        (6, [0, 1, 2, 3], "8 on this machine, and there is cpu and cuda:0 to cuda:5: lower trainer.devices to 3, or set"),
        (1, [0], "2 on this machine, and there is cpu and cuda:0: set language_model.device to auto"),
    ],
)
def test_fewer_gpus_than_it_takes_is_a_line(there: int, used: list[int], says: str):
    with pytest.raises(InputError) as caught:
        spare_gpus(used, ranks=len(used), n_gpus=there)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_one_gpu_for_the_models_of_all_ranks_is_refused(machine: Any):
    machine(8)
    with pytest.raises(InputError, match="device: cuda:5 would hold the language models of all 2 ranks: own gives each its own GPU"):
        assign_device("cuda:5", ranks(0, 1))


@pytest.mark.parametrize(
    ("asked", "there", "says"),
    [("cuda:9", 4, "cpu and cuda:0 to cuda:3"), ("cuda", 0, "cpu alone"), ("gpu:1", 1, "cpu and cuda:0"), ("nowhere", 0, "cpu alone")],
)
def test_a_device_that_is_not_there_is_a_line(asked: str, there: int, says: str, machine: Any):
    machine(there)
    with pytest.raises(InputError, match=f"^device: '{asked}' is not there: there is {says}$"):
        parse_device(asked)


# Without an SAE to lie beside, as in a measurement, there is nothing to keep away from.
def test_alone_a_model_lies_where_it_can(machine: Any):
    machine(0)
    assert [parse_device(asked) for asked in ("auto", "own", "cpu")] == [CPU] * 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-c", "two_devices"], "device: own needs a GPU for each rank's language model besides those of the SAEs, 1 on this machine"),
        (["--data.init_args.language_model.init_args.device", "cuda:9"], "device: 'cuda:9' is not there: there is cpu alone"),
    ],
)
def test_the_command_line_says_it_in_a_line(
    words: list[str], says: str, folder: str, tmp_path: Path, machine: Any, capsys: pytest.CaptureFixture[str]
):
    machine(0)
    name = f"--data.init_args.language_model.init_args.name={folder}"
    hook = "--data.init_args.language_model.init_args.hook=blocks.1.hook_resid_post"
    assert main(["fit", "-c", "quickstart", "-c", "solo", *words, "--run", str(tmp_path / "run"), name, hook]) == 2
    assert f"metasae: error: {says}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# The meta device takes what is moved to it and refuses to mix it with anything else.
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batches_come_to_the_saes_device(dtype: str, prefetch: int, lm: HuggingFaceLM):
    iterator = iter(stream(lm, home=META, prefetch=prefetch, buffer_dtype=dtype))
    found = [batch.activations for batch in islice(iterator, 5)]
    iterator.close()
    plain = batches(stream(lm), 5)
    assert [(x.device, x.dtype, x.shape) for x in found] == [(META, torch.float32, x.shape) for x in plain]
    assert same(batches(stream(lm, home=CPU, prefetch=prefetch)), batches(stream(lm)))


# A saved buffer's waiting batches too.
def test_after_a_restore_as_well(lm: HuggingFaceLM):
    early = stream(lm, prefetch=3, checkpoint_buffer="activations")
    iterator = iter(early)
    next(iterator)
    state = early.state_dict()
    iterator.close()
    again = stream(lm, home=META, prefetch=3, checkpoint_buffer="activations")
    again.load_state_dict(state)
    iterator = iter(again)
    assert {batch.activations.device for batch in islice(iterator, 5)} == {META}
    iterator.close()


# Work on two GPUs, on streams that are not those of the training step; a batch is ready when the SAE's has come so far.
def test_each_gpu_has_a_stream_beside_the_steps(lm: HuggingFaceLM, monkeypatch: pytest.MonkeyPatch):
    done: list[tuple[Any, ...]] = []

    class Side:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def wait_stream(self, other: Any) -> None:
            done.append(("waits for", other))

        def record_event(self) -> str:
            done.append(("event", self.device.index))
            return f"ready on {self.device}"

    @contextlib.contextmanager
    def entered(side: Side) -> Iterator[None]:
        done.append(("enters", side.device.index))
        yield
        done.append(("leaves", side.device.index))

    monkeypatch.setattr(torch.cuda, "Stream", Side)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"steps of {device}")
    made: ActivationStream = stream(lm, prefetch=1)
    made.home, made._gpus = torch.device("cuda", 0), [torch.device("cuda", 0), torch.device("cuda", 2)]
    monkeypatch.setattr(made, "_made", lambda place: iter(handed))
    handed = [next(stream(lm)._batches({**stream(lm)._place}))]
    assert [each.ready for each in made._batches({})] == ["ready on cuda:0"]
    begin = [("waits for", "steps of cuda:0"), ("enters", 0), ("waits for", "steps of cuda:2"), ("enters", 2)]
    assert done == [*begin, ("event", 0), ("leaves", 2), ("leaves", 0)]


# A trainer says where: the data module has the model loaded at its seat, and batches sent to the SAE.
def test_a_data_module_asks_its_trainer(folder: str, monkeypatch: pytest.MonkeyPatch):
    sizes: dict[str, Any] = {"tokens": 160, "batch_size": 16, "context_size": 12, "buffer_size": 64, "held_out": 0.2}
    data = ActivationsDataModule(HuggingFaceLM(folder, "blocks.1.hook_resid_post", device="own"), Texts(documents()), **sizes)
    strategy = SimpleNamespace(root_device=META)
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, strategy=strategy)  # type: ignore[assignment]
    asked: list[Any] = []
    monkeypatch.setattr(device, "assign_device", lambda name, among: asked.append((name, among)) or CPU)
    data.setup("fit")
    assert asked == [("own", strategy)]
    assert data.language_model.device == CPU
    assert next(iter(data.train_dataloader())).activations.device == META
    data.teardown("fit")
