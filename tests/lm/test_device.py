"""The device of each rank's language model, errors about missing devices, and batches on the SAE's device."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from metasae_lightning.cli import main
from metasae_lightning.data import ActivationsDataModule
from metasae_lightning.data.activation_stream import ActivationStream
from metasae_lightning.data.stream import PreparedBatch
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
    return str(save_model(tmp_path_factory.mktemp("device") / "tiny", "llama", layers=2))


@pytest.fixture(scope="module")
def lm(folder: str) -> HuggingFaceLM:
    model = HuggingFaceLM(folder, "blocks.1.hook_resid_post", device="cpu")
    model.load()
    return model


@pytest.fixture
def pretend_gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that pretends that this machine has `n_gpus` GPUs."""
    return lambda n_gpus: monkeypatch.setattr(device, "count_gpus", lambda: n_gpus)


def strategy_on_gpus(*numbers: int, rank: int = 0) -> Any:
    """The strategy of one rank; the SAEs of all ranks are on the GPUs of these numbers."""
    devices = [torch.device("cuda", number) for number in numbers]
    return SimpleNamespace(root_device=devices[rank], parallel_devices=devices, local_rank=rank)


# Eight GPUs with SAEs on the first four: `own` puts the language models on the last four, in the order of ranks.
@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize(
    ("requested", "numbers"), [("own", [4, 5, 6, 7]), ("auto", [0, 1, 2, 3]), ("cuda", [0, 1, 2, 3]), ("cpu", [None] * 4)]
)
def test_each_rank_has_a_device_for_its_language_model(requested: str, numbers: list[int | None], rank: int, pretend_gpus: Any):
    pretend_gpus(8)
    assert assign_device(requested, strategy_on_gpus(0, 1, 2, 3, rank=rank)).index == numbers[rank]


# With one rank, a named device is used; `own` is the first GPU without the SAE, or the first GPU if the SAE is on the CPU.
@pytest.mark.parametrize(
    ("requested", "sae_gpu", "gpu"), [("cuda:1", 0, 1), ("cuda:0", 0, 0), ("own", 0, 1), ("own", 1, 0), ("own", None, 0)]
)
def test_one_rank_has_the_requested_device(requested: str, sae_gpu: int | None, gpu: int, pretend_gpus: Any):
    pretend_gpus(2)
    strategy = SimpleNamespace(root_device=CPU if sae_gpu is None else torch.device("cuda", sae_gpu))
    assert assign_device(requested, strategy) == torch.device("cuda", gpu)


@pytest.mark.parametrize(
    ("n_gpus", "used", "message"),
    [
        (6, [0, 1, 2, 3], "8 on this machine, and there is cpu and cuda:0 to cuda:5: lower trainer.devices to 3, or set"),
        (1, [0], "2 on this machine, and there is cpu and cuda:0: set language_model.device to auto"),
    ],
)
def test_too_few_gpus_for_own_is_an_error_of_one_line(n_gpus: int, used: list[int], message: str):
    with pytest.raises(InputError) as caught:
        spare_gpus(used, ranks=len(used), n_gpus=n_gpus)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_one_gpu_for_the_models_of_all_ranks_is_refused(pretend_gpus: Any):
    pretend_gpus(8)
    with pytest.raises(InputError, match="device: cuda:5 would hold the language models of all 2 ranks: own gives each its own GPU"):
        assign_device("cuda:5", strategy_on_gpus(0, 1))


@pytest.mark.parametrize(
    ("requested", "n_gpus", "devices"),
    [("cuda:9", 4, "cpu and cuda:0 to cuda:3"), ("cuda", 0, "cpu alone"), ("gpu:1", 1, "cpu and cuda:0"), ("nowhere", 0, "cpu alone")],
)
def test_a_missing_device_is_an_error_that_lists_the_devices(requested: str, n_gpus: int, devices: str, pretend_gpus: Any):
    pretend_gpus(n_gpus)
    with pytest.raises(InputError, match=f"^device: '{requested}' is not there: there is {devices}$"):
        parse_device(requested)


# A measurement has no SAE in training whose GPU the language model should share or avoid.
def test_without_gpus_auto_and_own_are_the_cpu(pretend_gpus: Any):
    pretend_gpus(0)
    assert [parse_device(requested) for requested in ("auto", "own", "cpu")] == [CPU] * 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-c", "two_devices"], "device: own needs a GPU for each rank's language model besides those of the SAEs, 1 on this machine"),
        (["--data.init_args.language_model.init_args.device", "cuda:9"], "device: 'cuda:9' is not there: there is cpu alone"),
    ],
)
def test_the_command_line_prints_the_error_in_one_line(
    flags: list[str], message: str, folder: str, tmp_path: Path, pretend_gpus: Any, capsys: pytest.CaptureFixture[str]
):
    pretend_gpus(0)
    name = f"--data.init_args.language_model.init_args.name={folder}"
    hook = "--data.init_args.language_model.init_args.hook=blocks.1.hook_resid_post"
    assert main(["fit", "-c", "quickstart", "-c", "solo", *flags, "--run", str(tmp_path / "run"), name, hook]) == 2
    assert f"metasae: error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# The meta device stands for the SAE's GPU: operations that mix its tensors with those of another device fail.
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batches_are_on_the_saes_device(dtype: str, prefetch: int, lm: HuggingFaceLM):
    iterator = iter(stream(lm, home=META, prefetch=prefetch, buffer_dtype=dtype))
    on_meta = [batch.activations for batch in islice(iterator, 5)]
    iterator.close()
    on_cpu = batches(stream(lm), 5)
    assert [(x.device, x.dtype, x.shape) for x in on_meta] == [(META, torch.float32, x.shape) for x in on_cpu]
    assert same(batches(stream(lm, home=CPU, prefetch=prefetch)), batches(stream(lm)))


# A checkpoint of the buffer holds finished batches too.
def test_batches_of_a_restored_buffer_are_on_the_saes_device(lm: HuggingFaceLM):
    saved = stream(lm, prefetch=3, checkpoint_buffer="activations")
    iterator = iter(saved)
    next(iterator)
    state = saved.state_dict()
    iterator.close()
    restored = stream(lm, home=META, prefetch=3, checkpoint_buffer="activations")
    restored.load_state_dict(state)
    iterator = iter(restored)
    assert {batch.activations.device for batch in islice(iterator, 5)} == {META}
    iterator.close()


# Two GPUs make batches, each in a CUDA stream apart from the training step's. A batch is ready after an event in the SAE's stream.
def test_each_gpu_makes_batches_in_a_cuda_stream_of_its_own(lm: HuggingFaceLM, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[Any, ...]] = []
    entered: dict[torch.device, Any] = {}

    class FakeStream:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def wait_stream(self, other: Any) -> None:
            calls.append(("waits for", other))

        def record_event(self) -> str:
            calls.append(("event", self.device.index))
            return f"ready on {self.device}"

    @contextlib.contextmanager
    def enter_stream(cuda_stream: FakeStream) -> Iterator[None]:
        calls.append(("enters", cuda_stream.device.index))
        entered[cuda_stream.device] = cuda_stream
        yield
        calls.append(("leaves", cuda_stream.device.index))

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", enter_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: entered.get(device, f"steps of {device}"))
    data_stream: ActivationStream = stream(lm, prefetch=1)
    data_stream.home, data_stream._gpus = torch.device("cuda", 0), [torch.device("cuda", 0), torch.device("cuda", 2)]
    batch = next(stream(lm)._batches({**stream(lm)._position}))

    def make_batches(position: Any) -> Iterator[PreparedBatch]:
        yield replace(batch, ready=data_stream._record_ready())

    monkeypatch.setattr(data_stream, "_make_batches", make_batches)
    assert [batch.ready for batch in data_stream._batches({})] == ["ready on cuda:0"]
    first_calls = [("waits for", "steps of cuda:0"), ("enters", 0), ("waits for", "steps of cuda:2"), ("enters", 2)]
    assert calls == [*first_calls, ("event", 0), ("leaves", 2), ("leaves", 0)]


# The data module loads the model on the device that `assign_device` returns, and sends batches to the SAE's device.
def test_a_data_module_takes_devices_from_its_trainers_strategy(folder: str, monkeypatch: pytest.MonkeyPatch):
    sizes: dict[str, Any] = {"tokens": 160, "batch_size": 16, "context_size": 12, "buffer_size": 64, "held_out": 0.2}
    data = ActivationsDataModule(HuggingFaceLM(folder, "blocks.1.hook_resid_post", device="own"), Texts(documents()), **sizes)
    strategy = SimpleNamespace(root_device=META)
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, strategy=strategy)  # type: ignore[assignment]
    calls: list[Any] = []
    monkeypatch.setattr(device, "assign_device", lambda name, strategy: calls.append((name, strategy)) or CPU)
    data.setup("fit")
    assert calls == [("own", strategy)]
    assert data.language_model.device == CPU
    assert next(iter(data.train_dataloader())).activations.device == META
    data.teardown("fit")
