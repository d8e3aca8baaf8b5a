"""The table of tiles: what it picks for a GPU, a dtype and a shape, and that it always fits."""

import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from expertune.ops.experts.scattermoe import tiling
from expertune.ops.experts.scattermoe.tiling import TILES, LinearTile, TileRow, find_tile, fitting_rows, pick_tile

KIB = 1024
HOPPER, AMPERE = ((9, 0), 227 * KIB), ((8, 0), 163 * KIB)
GPUS = {
    "sm_75": ((7, 5), 64 * KIB),
    "sm_80": AMPERE,
    "sm_86": ((8, 6), 99 * KIB),
    "sm_89": ((8, 9), 99 * KIB),
    "sm_90": HOPPER,
    "sm_100": ((10, 0), 227 * KIB),
    "sm_120": ((12, 0), 99 * KIB),
    "48 KiB": ((5, 0), 48 * KIB),
}


@pytest.fixture
def empty_cache() -> Iterator[None]:
    tiling._rows_of.cache_clear()
    yield
    tiling._rows_of.cache_clear()


def tile_on(gpu: tuple[tuple[int, int], int], num_rows: int, num_experts: int, item_bytes: int = 2) -> LinearTile:
    return find_tile(fitting_rows(*gpu, item_bytes), num_rows, num_experts)


@pytest.mark.parametrize(("num_rows", "num_experts"), [(0, 128), (1024 * 8, 128), (8192 * 8, 128), (8192 * 2, 8)])
def test_hopper_has_one_tile_for_every_shape(num_rows: int, num_experts: int) -> None:
    assert tile_on(HOPPER, num_rows, num_experts) == LinearTile(128, 256, 64, 8, 3, halves=True, hopper=True)


def test_the_first_row_that_covers_a_shape_decides() -> None:
    small, any_size = LinearTile(rows=16), LinearTile(rows=32)
    rows = (
        TileRow((0, 0), 2, small, "", max_rows_per_expert=64),
        TileRow((0, 0), 2, any_size, ""),
    )
    assert [find_tile(rows, num_rows, 8) for num_rows in (0, 64 * 8, 64 * 8 + 1)] == [small, small, any_size]


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("item_bytes", [2, 4])
@pytest.mark.parametrize("num_rows", [0, 100, 10**5, 10**7])
def test_every_gpu_gets_a_tile_that_fits(gpu: tuple[tuple[int, int], int], item_bytes: int, num_rows: int) -> None:
    tile = tile_on(gpu, num_rows, 64, item_bytes)
    assert tile.shared_memory_bytes(item_bytes) <= gpu[1]
    if gpu[0] < (9, 0) and item_bytes == 2:
        assert not tile.descriptors


def test_a_small_multiprocessor_gets_a_smaller_tile_whatever_the_generation() -> None:
    small = LinearTile(128, 128, 32, 8, 3, descriptors=False)
    assert [tile_on(GPUS[name], 10**5, 64) for name in ("sm_80", "sm_86", "sm_89", "sm_120")] == [small] * 4
    assert tile_on(GPUS["sm_75"], 10**5, 64).rows == 64
    assert tile_on(GPUS["sm_100"], 10**5, 64) == tile_on(HOPPER, 10**5, 64)
    assert tile_on(((9, 0), 208 * KIB), 10**5, 64) == small, "208 KiB and a quarter is what it needs"


# (tile, bytes of an item, rank): what Triton 3.6 asks for when it compiles the kernel for sm_90.
COMPILED = [
    (LinearTile(), 2, 16, 213016),
    (LinearTile(halves=True), 2, 64, 213016),
    (LinearTile(), 2, 128, 213016),
    (LinearTile(num_stages=4), 2, 16, 262176),
    (LinearTile(k_step=32, num_stages=5), 2, 32, 188456),
    (LinearTile(rows=64), 2, 32, 155672),
    (LinearTile(rows=64, columns=128, num_stages=4), 2, 64, 114720),
    (LinearTile(rows=256, columns=128), 2, 16, 213016),
    (LinearTile(rows=64, columns=64, k_step=32), 4, 16, 57360),
    (LinearTile(rows=32, columns=32, k_step=32, num_stages=2), 4, 64, 20480),
]


@pytest.mark.parametrize(("tile", "item_bytes", "rank", "compiled_bytes"), COMPILED)
def test_the_formula_bounds_what_the_compiler_asks_for(
    tile: LinearTile, item_bytes: int, rank: int, compiled_bytes: int
) -> None:
    bound = tile.shared_memory_bytes(item_bytes)
    assert compiled_bytes <= bound
    if item_bytes == 2:
        assert bound - compiled_bytes < 256, "the bound is close to it"


def test_rows_cite_figures_and_can_be_reached() -> None:
    for row in TILES:
        assert re.search(r"H200.*\d\.?\d* (ms|us)", row.measured) or row.measured.startswith("not measured")
        assert row.measured.startswith("not measured") == (row.capability < (9, 0))
    assert len({(row.item_bytes, row.capability, row.max_rows_per_expert) for row in TILES}) == len(TILES) - 1
    picked = {
        id(next(row for row in fitting_rows(*gpu, item_bytes) if row.covers(num_rows, num_experts)))
        for gpu in GPUS.values()
        for item_bytes in (2, 4)
        for num_rows, num_experts in ((64, 64), (2048 * 64, 64), (10**7, 64))
    }
    assert picked == {id(row) for row in TILES}


def test_without_a_row_that_fits_it_says_so() -> None:
    for rows in (fitting_rows(*HOPPER, 8), fitting_rows((9, 0), KIB, 2)):
        with pytest.raises(ValueError, match="no row that fits"):
            find_tile(rows, 100, 4)


@pytest.mark.usefixtures("empty_cache")
def test_the_device_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def properties(device: torch.device) -> SimpleNamespace:
        asked.append(device)
        return SimpleNamespace(
            name="a GPU", major=8, minor=9, total_memory=1, multi_processor_count=1,
            shared_memory_per_block=48 * KIB, shared_memory_per_block_optin=99 * KIB,
        )  # fmt: skip

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 9))
    device = torch.device("cuda", 0)
    assert pick_tile(10**5, 64, torch.bfloat16, device).columns == 128
    assert pick_tile(10**6, 64, torch.float16, device).columns == 128
    assert len(asked) == 1
    assert pick_tile(10**5, 64, torch.float32, device).columns == 64


def test_the_interpreter_gets_what_the_newest_gpu_gets() -> None:
    cpu = torch.device("cpu")
    assert pick_tile(100, 4, torch.bfloat16, cpu) == LinearTile(halves=True, hopper=True)
    assert pick_tile(100, 4, torch.float32, cpu) == LinearTile(64, 64, 32, 4)
