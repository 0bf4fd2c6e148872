"""Each kernel of the GPU path equals its formula; on a machine without a GPU, in Triton's interpreter (tests/conftest.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from metasae_lightning import functional
from metasae_lightning.compute.gpu import launch, row_kernels, select_kernels, sparse_kernels, torch_forms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parents[2]
SEEDS = range(20)


def assert_close(found: Tensor, wanted: Tensor, *, scale: float | None = None):
    """Equal to 1e-6 of the largest entry that took part."""
    largest = wanted.abs().max().item() if scale is None else scale
    assert (found.double() - wanted.double()).abs().max().item() <= 1e-6 * largest


def random_matrix(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Values, rows, columns and pointers of a sparse matrix, and its number of columns. One row is full, one or more are empty."""
    generator = torch.Generator().manual_seed(seed)
    n_rows, n = int(torch.randint(3, 7, (), generator=generator)), int(torch.randint(1, 12, (), generator=generator))
    taken = torch.rand(n_rows, n, generator=generator) < 0.5
    full, empty, *_ = torch.randperm(n_rows, generator=generator).tolist()
    taken[full], taken[empty] = True, False
    rows, columns = taken.nonzero().T.contiguous()
    pointers = torch.cat([torch.zeros(1, dtype=torch.int64), taken.sum(1).cumsum(0)])
    index = torch.int32 if seed % 2 else torch.int64
    values = torch.randn(len(rows), generator=generator)
    rows, columns, pointers = (indices.to(DEVICE, index) for indices in (rows, columns, pointers))
    return values.to(DEVICE), rows, columns, pointers, n


def random_rows(seed: int, n_rows: int, width: int) -> Tensor:
    return torch.randn(n_rows, width, generator=torch.Generator().manual_seed(1000 + seed)).to(DEVICE)


def width(seed: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """A width: 1, a power of two, or none. In every second seed it is above a program's block, as real widths above 4,096 are."""
    monkeypatch.setattr(launch, "LARGEST_BLOCK", (4096, 32)[seed // 2 % 2])
    return (1, 5, 33, 64, 24, 16, 70, 1)[seed % 8]


def test_a_product_equals_its_formula(monkeypatch: pytest.MonkeyPatch):
    for seed in SEEDS:
        values, _, columns, pointers, n = random_matrix(seed)
        dense = random_rows(seed, n, width(seed, monkeypatch))
        wanted = torch_forms.product(values.double(), columns, pointers, dense.double())
        assert_close(sparse_kernels.product(values, columns, pointers, dense), wanted)


# With segments of 2 and 3, most rows are split, some in as many parts as they have nonzeros; row lengths are multiples of them and not.
def test_a_product_of_split_rows_and_their_sums_equal_their_formula(monkeypatch: pytest.MonkeyPatch):
    for seed in SEEDS:
        monkeypatch.setattr(sparse_kernels, "SEGMENT", (2, 3, 128)[seed % 3])
        values, _, columns, pointers, n = random_matrix(seed)
        dense = random_rows(seed, n, width(seed, monkeypatch))
        found, sums = sparse_kernels.product_and_sums(values, columns, pointers, dense)
        wanted, wanted_sums = torch_forms.product_and_sums(values.double(), columns, pointers, dense.double())
        assert_close(found, wanted)
        assert_close(sums, wanted_sums)


# One latent has 700 nonzeros: six segments of the true length, joined four at a time.
def test_a_latent_with_all_rows_is_split_and_gives_the_same_bits_again():
    lengths = torch.tensor([0, 700, 0, 128, 129, 0])
    pointers = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(DEVICE, torch.int32)
    columns = torch.randint(700, (int(lengths.sum()),), generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.int32)
    values, dense = random_rows(0, len(columns), 1)[:, 0], random_rows(1, 700, 6)
    found = sparse_kernels.product_and_sums(values, columns, pointers, dense)
    for one, wanted, again in zip(
        found,
        torch_forms.product_and_sums(values.double(), columns, pointers, dense.double()),
        sparse_kernels.product_and_sums(values, columns, pointers, dense),
        strict=True,
    ):
        assert_close(one, wanted)
        assert torch.equal(one, again)


def test_a_matrix_of_empty_rows_gives_zeros():
    values, columns = torch.zeros(0, device=DEVICE), torch.zeros(0, dtype=torch.int32, device=DEVICE)
    pointers, W_dec, x = torch.zeros(4, dtype=torch.int32, device=DEVICE), random_rows(0, 2, 5), random_rows(1, 3, 5)
    found, sums = sparse_kernels.product_and_sums(values, columns, pointers, W_dec)
    assert not found.any() and not sums.any() and found.shape == (3, 5)
    assert sparse_kernels.sampled(columns, columns, x, W_dec).shape == (0,)
    difference, _, error = sparse_kernels.reconstruction_error(values, columns, columns, pointers, W_dec, W_dec[0], x)
    assert torch.equal(difference, W_dec[0] - x)
    assert_close(error, difference.double().square().sum())


def test_sampled_products_equal_their_formula(monkeypatch: pytest.MonkeyPatch):
    for seed in SEEDS:
        _, rows, columns, pointers, n = random_matrix(seed)
        a, b = random_rows(seed, len(pointers) - 1, width(seed, monkeypatch)), random_rows(seed + 1, n, width(seed, monkeypatch))
        wanted = torch_forms.sampled(rows, columns, a.double(), b.double())
        assert_close(sparse_kernels.sampled(rows, columns, a, b), wanted)


def test_the_reconstruction_error_equals_its_formula(monkeypatch: pytest.MonkeyPatch):
    for seed in SEEDS:
        values, rows, columns, pointers, n = random_matrix(seed)
        W_dec, x = random_rows(seed, n, width(seed, monkeypatch)), random_rows(seed + 1, len(pointers) - 1, width(seed, monkeypatch))
        b_dec = random_rows(seed + 2, 1, width(seed, monkeypatch))[0]
        found = sparse_kernels.reconstruction_error(values, rows, columns, pointers, W_dec, b_dec, x)
        doubles = (tensor.double() for tensor in (W_dec, b_dec, x))
        wanted = torch_forms.reconstruction_error(values.double(), rows, columns, pointers, *doubles)
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other)


def test_kernels_over_rows_equal_their_formulas(monkeypatch: pytest.MonkeyPatch):
    for seed in SEEDS:
        W = random_rows(seed, 4, width(seed, monkeypatch)) * torch.tensor([[1.0], [100.0], [1e-3], [0.0]], device=DEVICE)
        unit, gradient = torch.empty_like(W), random_rows(seed + 1, 4, W.shape[1])
        row_kernels.unit_rows(W, unit)
        wanted_unit = functional.unit_rows(W.double())
        assert_close(unit, wanted_unit)

        found = gradient.clone()
        row_kernels.remove_radial(found, W)
        wanted = gradient.double() - (gradient.double() * wanted_unit).sum(1, keepdim=True) * wanted_unit
        assert_close(found, wanted, scale=gradient.abs().max().item())

        reconstruction = unit * 0.8 + 0.1 * random_rows(seed + 2, 4, W.shape[1])
        p, slope = row_kernels.decomposability(W, reconstruction, 0.7)
        wanted_p, wanted_slope = functional.decomposability_with_slope(W.double(), reconstruction.double(), 0.7)
        assert_close(p, wanted_p)
        # A slope is inverse to the norm of its row, and those differ by a factor of 1e5 and more.
        size = 2 / (0.7 * W.double().norm(dim=1, keepdim=True).clamp(min=1e-12))
        assert_close(slope / size, wanted_slope / size, scale=1.0)

        row_kernels.unit_rows(W, W)
        assert torch.equal(W, unit)


def wanted_keys(products: Tensor, bias: Tensor, scale: Tensor | None, cut: Tensor, first_row: int) -> list[int]:
    """The keys by their definition, one entry at a time in Python's integers, best first."""
    values = products + bias if scale is None else (products + bias) * scale
    keys: list[int] = []
    for row, column in ((values > cut) & (values > 0)).nonzero().tolist():
        place = (first_row + row) * products.shape[1] + column
        keys.append(int(values[row, column].view(torch.int32)) * 2**32 + 2**32 - 1 - place)
    return sorted(keys, reverse=True)


def compacted(products: Tensor, bias: Tensor, scale: Tensor | None, cut: Tensor, first_row: int, room: int) -> tuple[list[int], int]:
    """The keys in the room, best first, and the count, after a check that nothing is written behind the room."""
    buffer, count = torch.zeros(room + 50, dtype=torch.int64, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    on_device = [None if tensor is None else tensor.to(DEVICE) for tensor in (products, bias, scale, cut)]
    select_kernels.compact(*on_device, buffer[:room], count, first_row)
    assert not buffer[room:].any()
    return sorted(buffer[:room][buffer[:room] != 0].tolist(), reverse=True), int(count)


# Rounded values make ties with the cut and with each other. The last rows' places end just below 2^32.
def test_compaction_takes_what_is_above_the_cut_and_no_more_than_fits():
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        n_rows, n = ((3, 40), (17, 13), (2, 1030), (16, 512))[seed % 4]
        products = torch.randn(n_rows, n, generator=generator).mul(4).round().div(4)
        special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40])
        products.view(-1)[torch.randperm(n_rows * n, generator=generator)[:25]] = special.repeat(5)
        bias = torch.randn(n, generator=generator).round()
        scale = torch.randn(n, generator=generator) if seed % 2 else None
        cut = torch.tensor((1.0, 0.25, -float("inf"), float("nan"), float("inf"))[seed % 5])
        first_row = (0, 5, 2**31 // n - 1, 2**32 // n - n_rows)[seed // 4 % 4]
        wanted = wanted_keys(products, bias, scale, cut, first_row)
        assert bool(wanted) == bool(cut < float("inf"))
        assert len(set(wanted)) == len(wanted)

        keys, count = compacted(products, bias, scale, cut, first_row, room=len(wanted) + seed)
        assert (keys, count) == (wanted, len(wanted))

        small = len(wanted) * 2 // 3
        keys, count = compacted(products, bias, scale, cut, first_row, room=small)
        assert count == len(wanted) and len(set(keys)) == len(keys) == small
        assert set(keys) <= set(wanted)


# A micro-batch appends to what the batches before it have left.
def test_compaction_appends_to_the_keys_of_earlier_rows():
    products, bias, cut = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)), torch.zeros(30), torch.tensor(1.0)
    keys, count = torch.zeros(600, dtype=torch.int64, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for first_row, rows in ((0, products[:7]), (7, products[7:])):
        select_kernels.compact(rows.to(DEVICE), bias.to(DEVICE), None, cut.to(DEVICE), keys, count, first_row)
    assert sorted(keys[: int(count)].tolist(), reverse=True) == wanted_keys(products, bias, None, cut, 0)


def compile_check(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The table of benchmarks/gpu_kernels.py, made by Triton's compiler and not its interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "benchmarks/gpu_kernels.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


KERNELS = {
    *("compact", "compact even", "compact scaled", "compact scaled even", "product", "product split", "join_segments", "sampled"),
    *("reconstruction_error", "unit_rows", "remove_radial", "decomposability"),
}


def assert_nothing_spills(table: str, widths: list[int], capabilities: list[int]):
    rows = [(line[:24].strip(), *map(int, line[24:].split())) for line in table.splitlines()[1:]]
    assert {row[:3] for row in rows} == {(name, width, sm) for name in KERNELS for width in widths for sm in capabilities}
    assert all(0 < row[4] <= 255 and row[5] == 0 for row in rows)


def test_every_kernel_compiles_without_spilling(tmp_path: Path):
    made = compile_check(tmp_path, "--widths", "1280", "--capabilities", "90")
    assert made.returncode == 0, made.stderr
    assert_nothing_spills(made.stdout, [1280], [90])


@pytest.mark.slow
def test_every_kernel_compiles_without_spilling_at_the_widths_of_the_paper(tmp_path: Path):
    made = compile_check(tmp_path, "--widths", "576", "1280", "3584")
    assert made.returncode == 0, made.stderr
    assert_nothing_spills(made.stdout, [576, 1280, 3584], [80, 90])


# The control: with 24 registers a kernel must spill, and the check must see it.
@pytest.mark.slow
def test_the_compile_check_sees_a_spill(tmp_path: Path):
    made = compile_check(tmp_path, "--widths", "3584", "--capabilities", "80", "--most-registers", "24")
    assert made.returncode == 1
    assert "bytes spilled" in made.stderr
