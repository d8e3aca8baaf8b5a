"""The projection of `linear` with its pipeline written out for Hopper, in Triton's gluon dialect.

    out_s = W[e] x_r(s) + b[e] + B[e] (scaling u_s)                        for row s of expert e

Operands, tiles and order of the sums are those of `linear`, and so is every bit of the result. Triton's own pipeline
ends with each tile: the tensor cores wait for the last product, for the result to leave and for the first operands of
the next tile, 4.8 us beside 0.72 us for a step of 64 (H200). Here it runs on, and 3.1 us are left; cuBLAS has 2.0.

A step, with STAGES buffers of operands of which STAGES - 1 are on their way:
    wait until its operands are in shared memory          W, B and grouped rows come by TMA, gathered rows by cp.async
    start its product (wgmma), wait for the product before it
    load what the step STAGES - 1 later needs into the buffer that this has freed: of this tile, or of the next
After a tile's last step: the adapter's product, B being in the buffer of the result; then the result, whose left
half has a buffer of its own and whose right half takes that of the last step, leaves by TMA while the next tile begins.

Programs take tiles in order from a counter (2 to 4 % faster than every 132nd tile where experts' rows do not fill
their tiles), two tiles ahead, so that nothing waits for it. A tile at most half full is multiplied as half a tile.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from expertune.ops.experts.scattermoe.launches import describe_hopper_linear
from expertune.ops.experts.scattermoe.linear import (
    FAR,
    GROUP_TILES,
    TRITON_DTYPES,
    clipped_view,
    fits_descriptor,
    is_aligned,
)
from expertune.ops.experts.scattermoe.tiles import RowTable
from expertune.ops.experts.scattermoe.tiling import HOPPER_STAGES, HOPPER_TILE
from expertune.ops.integers import cdiv
from expertune.ops.triton_launch import Launcher, is_hopper, make_descriptor, num_multiprocessors

ROWS, COLUMNS, STEP = (gl.constexpr(size) for size in HOPPER_TILE)  # a step: one line of 128 bytes of each row
HALF = gl.constexpr(64)  # rows of a tile that is at most half full
STAGES = gl.constexpr(HOPPER_STAGES)
NUM_WARPS = gl.constexpr(8)
THREADS = gl.constexpr(32 * NUM_WARPS.value)
GROUP = gl.constexpr(GROUP_TILES)
MAX_RANK = 64  # B must fit where the result's left half is

# Names that changed after Triton 3.6.
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_view = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
_thread_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def _locate(tiles_ptr, capacity, tile, num_row_tiles, num_column_tiles):
    """(expert, first row, end row, first column): all columns of GROUP row tiles come before the next group."""
    tiles_in_group = GROUP * num_column_tiles
    first_of_group = (tile // tiles_in_group) * GROUP
    group_size = gl.minimum(num_row_tiles - first_of_group, GROUP)
    entry_ptr = tiles_ptr + first_of_group + (tile % tiles_in_group) % group_size
    first_column = ((tile % tiles_in_group) // group_size) * COLUMNS
    return gl.load(entry_ptr), gl.load(entry_ptr + capacity), gl.load(entry_ptr + 2 * capacity), first_column


@gluon.jit
def _rows(row_index_ptr, place, LAYOUT: gl.constexpr, GATHER: gl.constexpr):
    """The rows of x that a tile takes; past the end, rows of the tile once more."""
    first_row, end_row = place[1], place[2]
    lanes = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    return gl.load(row_index_ptr + first_row + lanes % (end_row - first_row)) if GATHER else lanes


# Values that go together go as tuples, which cost nothing:
#   x = (pointer, descriptor, stride, row index)       adapter = (pointer to u, descriptor of B, scaling)
#   smem = (x, w, result, answer of the counter, barriers)        place = (expert, first row, end row, first column)


@gluon.jit
def _load_step(
    x, w_desc, num_in, num_out, smem, stage, place, offsets, k,
    GATHER: gl.constexpr, TRANSPOSED: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Start to load x[rows, k:] and W[expert, columns, k:] into a stage; its barrier tells when they are there."""
    x_smem, w_smem, barrier = smem[0].index(stage), smem[1].index(stage), smem[4].index(stage)
    expert, first_row, end_row, first_column = place
    W_BYTES: gl.constexpr = COLUMNS * STEP * 2
    X_BYTES: gl.constexpr = ROWS * STEP * 2
    mbarrier.expect(barrier, W_BYTES if GATHER else W_BYTES + X_BYTES)
    if TRANSPOSED:
        _tma_load(w_desc, [expert * num_in + k, first_column], barrier, w_smem)
    else:
        _tma_load(w_desc, [expert * num_out + first_column, k], barrier, w_smem)
    if GATHER:
        ptrs = x[0] + k + gl.arange(0, STEP, layout=gl.SliceLayout(0, LAYOUT))[None, :] + offsets[:, None]
        if end_row - first_row > HALF:
            _thread_load(x_smem, ptrs)
        else:
            _thread_load(x_smem, ptrs, mask=(gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT)) < HALF)[:, None])
        async_copy.mbarrier_arrive(barrier, increment_count=False)
    else:
        _tma_load(x[1], [first_row, k], barrier, x_smem)


@gluon.jit
def _multiply(
    acc, smem, stage, phase, use_acc, BLOCK_S: gl.constexpr, GATHER: gl.constexpr, TRANSPOSED: gl.constexpr
):  # fmt: skip
    """acc += x W^T of a stage, once it is there. On return the product before this one is done, in every warp."""
    mbarrier.wait(smem[4].index(stage), phase)
    if GATHER:
        fence_async_shared()  # cp.async writes as threads do; wgmma reads as TMA does
    x = smem[0].index(stage).slice(0, BLOCK_S)
    w = smem[1].index(stage) if TRANSPOSED else smem[1].index(stage).permute((1, 0))
    acc = warpgroup_mma(x, w, acc, use_acc=use_acc, is_async=True)
    acc = warpgroup_mma_wait(num_outstanding=1, deps=[acc])
    _barrier()
    return acc


@gluon.jit
def _step_on(stage, phase):
    return gl.where(stage == STAGES - 1, 0, stage + 1), gl.where(stage == STAGES - 1, phase ^ 1, phase)


@gluon.jit
def _store(acc, out_desc, out_smem, last_smem, place, BLOCK_S: gl.constexpr):
    """The result from registers to shared memory, and on its way out; rows from end_row on are dropped by TMA."""
    first_row, end_row, first_column = place[1], place[2], place[3]
    SPLIT: gl.constexpr = COLUMNS // 2
    left, right = acc.to(out_smem.dtype).reshape(BLOCK_S, 2, SPLIT).permute(0, 2, 1).split()
    last_smem = _view(last_smem, out_smem.dtype, [ROWS, SPLIT], out_smem.layout)
    out_smem.slice(0, BLOCK_S).store(left)
    last_smem.slice(0, BLOCK_S).store(right)
    fence_async_shared()
    _barrier()
    for i in gl.static_range(2):
        source = _view(out_smem if i == 0 else last_smem, out_smem.dtype, [1, 1, ROWS, SPLIT], out_desc.layout)
        row = first_row - end_row + FAR
        _tma_store(out_desc, [FAR, end_row, row, first_column + i * SPLIT], source)


@gluon.jit
def _tile(
    x, w_desc, adapter, bias_ptr, out_desc, num_in, num_out, smem, stage, phase, b_phase,
    place, offsets, next_place, has_next, taken,
    HAS_BIAS: gl.constexpr, RANK: gl.constexpr, TRANSPOSED: gl.constexpr, B_TRANSPOSED: gl.constexpr,
    GATHER: gl.constexpr, BLOCK_S: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """A tile, whose first STAGES - 1 steps are on their way; on return those of the next are."""
    DTYPE: gl.constexpr = w_desc.dtype
    WARPS: gl.constexpr = [8, 1] if BLOCK_S == ROWS else [4, 2]
    # Half a tile: 64 columns at a time, so that every thread has columns of the left and of the right half.
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], WARPS, [16, COLUMNS if BLOCK_S == ROWS else COLUMNS // 4, 16])
    expert, first_row, end_row, first_column = place
    acc = gl.zeros((BLOCK_S, COLUMNS), gl.float32, layout=ACC)
    acc = _multiply(acc, smem, stage, phase, False, BLOCK_S, GATHER, TRANSPOSED)
    tma.store_wait(0)  # the tile before has left its buffers
    _load_step(
        x, w_desc, num_in, num_out, smem, (stage + STAGES - 1) % STAGES, place, offsets, (STAGES - 1) * STEP,
        GATHER, TRANSPOSED, LAYOUT,
    )  # fmt: skip
    stage, phase = _step_on(stage, phase)
    next_rows = _rows(x[3], next_place, LAYOUT, GATHER)  # next_place has arrived; wanted some steps later
    for k in range(STEP, num_in - (STAGES - 1) * STEP, STEP):
        acc = _multiply(acc, smem, stage, phase, True, BLOCK_S, GATHER, TRANSPOSED)
        _load_step(
            x, w_desc, num_in, num_out, smem, (stage + STAGES - 1) % STAGES, place, offsets, k + (STAGES - 1) * STEP,
            GATHER, TRANSPOSED, LAYOUT,
        )  # fmt: skip
        stage, phase = _step_on(stage, phase)

    smem[3].store(taken)
    offsets = next_rows.to(gl.int64) * x[2]
    if RANK > 0:
        u_ptr, b_desc, scaling = adapter
        B_SHAPE: gl.constexpr = [RANK, COLUMNS] if B_TRANSPOSED else [COLUMNS, RANK]
        b_smem, b_barrier = _view(smem[2], DTYPE, B_SHAPE, b_desc.layout), smem[4].index(STAGES)
        mbarrier.expect(b_barrier, COLUMNS * RANK * 2)
        if B_TRANSPOSED:
            _tma_load(b_desc, [expert * RANK, first_column], b_barrier, b_smem)
        else:
            _tma_load(b_desc, [expert * num_out + first_column, 0], b_barrier, b_smem)
        U_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
        rows = first_row + gl.arange(0, BLOCK_S, layout=gl.SliceLayout(1, U_LAYOUT))
        ranks = gl.arange(0, RANK, layout=gl.SliceLayout(0, U_LAYOUT))
        u_ptrs = u_ptr + rows.to(gl.int64)[:, None] * RANK + ranks[None, :]
        u = gl.load(u_ptrs, mask=(rows < end_row)[:, None], other=0.0)
    for i in gl.static_range(STAGES - 1):
        acc = _multiply(acc, smem, stage, phase, True, BLOCK_S, GATHER, TRANSPOSED)
        if has_next:
            _load_step(
                x, w_desc, num_in, num_out, smem, (stage + STAGES - 1) % STAGES, next_place, offsets, i * STEP,
                GATHER, TRANSPOSED, LAYOUT,
            )  # fmt: skip
        stage, phase = _step_on(stage, phase)
    if RANK > 0:
        u = (u.to(gl.float32) * scaling).to(DTYPE)
        mbarrier.wait(b_barrier, b_phase)
        acc = warpgroup_mma(u, b_smem if B_TRANSPOSED else b_smem.permute((1, 0)), acc, is_async=True)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
    if HAS_BIAS:
        columns = first_column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, ACC))
        bias = gl.load(bias_ptr + expert.to(gl.int64) * num_out + columns, mask=columns < num_out, other=0.0)
        acc += bias.to(gl.float32)[None, :]
    _barrier()  # all warps have read B and the last step's operands
    _store(acc, out_desc, smem[2], smem[1].index((stage + STAGES - 1) % STAGES), place, BLOCK_S)
    return stage, phase, offsets


@gluon.jit(launch_metadata=describe_hopper_linear, do_not_specialize=["tiles_capacity", "scaling"])
def _hopper_linear_kernel(
    x_ptr, x_desc, stride_x, row_index_ptr, w_desc, u_ptr, b_desc, scaling, bias_ptr, out_desc,
    tiles_ptr, tiles_capacity, num_in, num_out,
    GATHER: gl.constexpr, HAS_BIAS: gl.constexpr, RANK: gl.constexpr, TRANSPOSED: gl.constexpr,
    B_TRANSPOSED: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    tl.extra.cuda.gdc_wait()
    num_row_tiles = gl.load(tiles_ptr + 3 * tiles_capacity)
    num_column_tiles = gl.cdiv(num_out, COLUMNS)
    num_tiles = num_row_tiles * num_column_tiles
    tile = gl.program_id(0)
    if tile < num_tiles:
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [NUM_WARPS, 1], [1, 0])  # 16 bytes of x a thread
        X_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, STEP], DTYPE)
        OUT_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS // 2], DTYPE)
        x_smem = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, STEP], X_LAYOUT)
        w_smem = gl.allocate_shared_memory(DTYPE, [STAGES] + w_desc.block_type.shape, w_desc.layout)  # noqa: RUF005
        out_smem = gl.allocate_shared_memory(DTYPE, [ROWS, COLUMNS // 2], OUT_LAYOUT)
        taken_smem = gl.allocate_shared_memory(gl.int32, [THREADS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        barriers = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(
            STAGES + 1
        ):  # the last one is B's; gathered rows tell of their arrival thread by thread
            mbarrier.init(barriers.index(i), count=1 + THREADS if GATHER and i < STAGES else 1)
        fence_async_shared()
        _barrier()
        x, adapter = (x_ptr, x_desc, stride_x, row_index_ptr), (u_ptr, b_desc, scaling)
        smem = (x_smem, w_smem, out_smem, taken_smem, barriers)

        place = _locate(tiles_ptr, tiles_capacity, tile, num_row_tiles, num_column_tiles)
        offsets = _rows(row_index_ptr, place, LAYOUT, GATHER).to(gl.int64) * stride_x
        for i in gl.static_range(STAGES - 1):
            _load_step(
                x, w_desc, num_in, num_out, smem, i, place, offsets, i * STEP, GATHER, TRANSPOSED, LAYOUT
            )  # fmt: skip
        ONE_EACH: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])
        threads = gl.arange(0, THREADS, layout=ONE_EACH)
        counter_ptrs = tiles_ptr + 3 * tiles_capacity + 1 + threads * 0
        next_tile = tile + gl.num_programs(0)
        stage, phase, b_phase = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
        while tile < num_tiles:
            # Thread 0 asks now, and nobody waits: the answer is passed on at the end of the tile.
            taken = gl.atomic_add(counter_ptrs, threads * 0 + 1, mask=threads == 0, sem="relaxed")
            has_next = next_tile < num_tiles
            next_place = _locate(
                tiles_ptr, tiles_capacity, gl.minimum(next_tile, num_tiles - 1), num_row_tiles, num_column_tiles
            )
            if place[2] - place[1] > HALF:
                stage, phase, offsets = _tile(
                    x, w_desc, adapter, bias_ptr, out_desc, num_in, num_out, smem, stage, phase, b_phase,
                    place, offsets, next_place, has_next, taken,
                    HAS_BIAS, RANK, TRANSPOSED, B_TRANSPOSED, GATHER, ROWS, LAYOUT,
                )  # fmt: skip
            else:
                stage, phase, offsets = _tile(
                    x, w_desc, adapter, bias_ptr, out_desc, num_in, num_out, smem, stage, phase, b_phase,
                    place, offsets, next_place, has_next, taken,
                    HAS_BIAS, RANK, TRANSPOSED, B_TRANSPOSED, GATHER, HALF, LAYOUT,
                )  # fmt: skip
            # Each tile asks once, so that the last answer is num_tiles - 1: the counter is zero for the next launch.
            gl.store(counter_ptrs, threads * 0, mask=(threads == 0) & (taken == num_tiles - 1))
            place, tile, b_phase = next_place, next_tile, b_phase ^ 1
            next_tile = gl.max(taken_smem.slice(0, 1).load(ONE_EACH), axis=0) + 2 * gl.num_programs(0)
        tma.store_wait(0)


_hopper_linear = Launcher(_hopper_linear_kernel)


def takes(
    x_NX: Tensor, row_index_S: Tensor | None, weight_EYX: Tensor, u_SR: Tensor | None, lora_b_EYR: Tensor | None
) -> bool:
    """Whether the kernel knows these operands, and their GPU; `linear` knows any.

    16 bits on Hopper; X a multiple of 64 from 256 on, Y of 8; a padded rank of at most 64; weights, x and B dense but
    for one dimension each, which TMA copies, and experts one after the other without gaps.
    """
    num_out, num_in = weight_EYX.shape[1:]
    rank = 0 if u_SR is None else u_SR.shape[1]
    return (
        x_NX.dtype in (torch.bfloat16, torch.float16)
        and x_NX.shape[0] > 0
        and is_hopper(x_NX.device)
        and num_in % STEP.value == 0
        and num_in >= STAGES.value * STEP.value
        and num_out % 8 == 0
        and rank <= MAX_RANK
        and fits_descriptor(x_NX)
        and _is_stack(weight_EYX)
        and (lora_b_EYR is None or _is_stack(lora_b_EYR))
    )


def launch_hopper_linear(
    x_NX: Tensor,
    row_index_S: Tensor | None,
    weight_EYX: Tensor,
    tiles: RowTable,
    num_rows: int,
    *,
    u_SR: Tensor | None = None,
    lora_b_EYR: Tensor | None = None,
    scaling: float = 0.0,
    bias_EY: Tensor | None = None,
) -> Tensor:
    """`launch_expert_linear` for what the kernel `takes`. tiles: of ROWS rows; its counter is zero before and after."""
    num_out, num_in = weight_EYX.shape[1:]
    out_SY = x_NX.new_empty(num_rows, num_out)
    w_desc, transposed = _stack_descriptor(weight_EYX, STEP.value)
    x_desc = b_desc = None
    b_transposed, rank = False, 0
    if row_index_S is None:
        x_desc = _descriptor(x_NX, x_NX.shape, x_NX.stride(), [ROWS.value, STEP.value])
    if u_SR is not None and lora_b_EYR is not None:
        rank = u_SR.shape[1]
        b_desc, b_transposed = _stack_descriptor(lora_b_EYR, rank)
    out_desc = _descriptor(out_SY, *clipped_view(out_SY), [1, 1, ROWS.value, COLUMNS.value // 2])
    num_programs = min(tiles.capacity * cdiv(num_out, COLUMNS.value), num_multiprocessors(x_NX.device))
    _hopper_linear(
        (num_programs,), x_NX, x_desc, x_NX.stride(0), row_index_S, w_desc, u_SR, b_desc, scaling,
        None if bias_EY is None else bias_EY.contiguous(), out_desc, tiles.entries_4M, tiles.capacity, num_in, num_out,
        row_index_S is not None, bias_EY is not None, rank, transposed, b_transposed, TRITON_DTYPES[x_NX.dtype],
        num_warps=NUM_WARPS.value,
    )  # fmt: skip
    return out_SY


def _is_stack(weight_EYX: Tensor) -> bool:
    """Whether the matrices of all experts, as they are stored, are one matrix that a descriptor can hold."""
    (_, rows, stride), transposed = _stored(weight_EYX)
    stride_expert, stride_out, stride_in = weight_EYX.stride()
    is_dense = (stride_out if transposed else stride_in) == 1 and stride_expert == rows * stride
    return is_dense and is_aligned(weight_EYX, [stride])


def _stored(weight_EYX: Tensor) -> tuple[tuple[int, int, int], bool]:
    """(columns, rows, stride of a row) of an expert's matrix as it is stored, and whether that is transposed."""
    (_, num_out, num_in), (_, stride_out, stride_in) = weight_EYX.shape, weight_EYX.stride()
    return ((num_in, num_out, stride_out), False) if stride_in == 1 else ((num_out, num_in, stride_in), True)


def _stack_descriptor(weight_EYX: Tensor, num_k: int) -> tuple[TensorDescriptor, bool]:
    """Of the matrices of all experts as one, in blocks of COLUMNS x num_k; and whether they are stored transposed."""
    (columns, rows, stride), transposed = _stored(weight_EYX)
    block = [num_k, COLUMNS.value] if transposed else [COLUMNS.value, num_k]
    return _descriptor(weight_EYX, [weight_EYX.shape[0] * rows, columns], [stride, 1], block), transposed


def _descriptor(tensor: Tensor, shape: Sequence[int], strides: Sequence[int], block: list[int]) -> TensorDescriptor:
    layout = _layout(tuple(block), tensor.dtype)
    return make_descriptor(TensorDescriptor, tensor, shape, strides, block_shape=block, layout=layout)


@cache
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """In shared memory. Kept, for to find it takes the host longer than a launch."""
    return gl.NVMMASharedLayout.get_default_for(list(block), TRITON_DTYPES[dtype])
