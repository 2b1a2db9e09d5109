"""The forward kernel for sm_90 whose warps have different work, in Gluon.

In :mod:`forward` all warps of a program do the same at the same time, and barriers keep them in step. Here one warp
loads tiles of keys and values into rings of shared memory, and two warpgroups have 64 queries each: the products of
one run beside the softmax of the other. What happens to a tile of scores is in :mod:`tile` and :mod:`position`, as for
all kernels.

:func:`serves` says which calls it can do. No shipped configuration asks for it (SPECIALIZED): it has been compiled, and
emulated in tests/test_hopper.py, but has never run on a GPU. ``python -m logpe tune`` tries it where it can run.
"""

from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import tile
from .configs import padded
from .launch import launch
from .options import Options
from .plan import RUNTIME_INTEGERS, Plan, cdiv
from .position import LN2, LOG2E, Parameters, query_gain

GROUP_ROWS = gl.constexpr(64)  # queries of a warpgroup: the rows of its matrix instruction
#: Registers of a thread: a multiprocessor has 168 for each thread of the three warpgroups that a launch rounds up to.
COMPUTE_REGISTERS, LOAD_REGISTERS = gl.constexpr(240), gl.constexpr(24)
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name before Triton 3.9


class Ring(NamedTuple):
    """Places in shared memory for tiles that are loaded ahead.

    Each place has two barriers: warpgroups wait on ``filled``, and the loading warp on ``free``. They pass in turns, so
    the parity of the turn says whether it has passed.
    """

    tiles: Any  # [STAGES, 1, 1, ROWS, BLOCK_D]
    filled: Any
    free: Any


@gluon.jit
def new_ring(descriptor, STAGES: gl.constexpr, READERS: gl.constexpr):
    """Return an empty Ring for tiles of a descriptor; a place is free again when READERS warpgroups have read it."""
    shape: gl.constexpr = [STAGES] + descriptor.block_type.shape  # noqa: RUF005 (Triton has no starred lists)
    tiles = gl.allocate_shared_memory(descriptor.dtype, shape, descriptor.layout)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(filled.index(stage), count=1)
        mbarrier.init(free.index(stage), count=READERS)
    return Ring(tiles, filled, free)


@gluon.jit
def fill(ring, t, descriptor, b, h, row):
    """Load rows from ``row`` on as the t-th tile of a ring, as soon as its place is free."""
    STAGES: gl.constexpr = ring.tiles.shape[0]
    stage = t % STAGES
    mbarrier.wait(ring.free.index(stage), (t // STAGES + 1) & 1)  # passes at once in the first turn
    mbarrier.expect(ring.filled.index(stage), descriptor.block_type.nbytes)
    async_load(descriptor, [b, h, row, 0], ring.filled.index(stage), ring.tiles.index(stage))


@gluon.jit
def wait_for(ring, t):
    """Return the t-th tile of a ring, [ROWS, BLOCK_D] in shared memory, when it is there."""
    STAGES: gl.constexpr = ring.tiles.shape[0]
    mbarrier.wait(ring.filled.index(t % STAGES), (t // STAGES) & 1)
    return ring.tiles.index(t % STAGES).reshape([ring.tiles.shape[3], ring.tiles.shape[4]])


@gluon.jit
def release(ring, t):
    """Say that this warpgroup has read the t-th tile."""
    mbarrier.arrive(ring.free.index(t % ring.tiles.shape[0]))


class Program(NamedTuple):
    """What the warps of a program share. All of them meet the same tiles of keys."""

    q: Any  # a Ring, with a place for each warpgroup, as the next two, whose tiles have BLOCK_N rows
    k: Any
    v: Any
    b: Any
    h: Any
    m0: Any
    queries: Any  # an Axis, as the next
    keys: Any
    bounds: Any


@gluon.jit
def load(program, q_tma, k_tma, v_tma, kv_head, SPLIT: gl.constexpr):
    """Do the work of the loading warp."""
    WARPGROUPS: gl.constexpr = program.q.tiles.shape[0]
    BLOCK_N: gl.constexpr = program.k.tiles.shape[3]
    b = program.b
    for warpgroup in gl.static_range(WARPGROUPS):
        fill(program.q, warpgroup, q_tma, b, program.h, program.m0 + warpgroup * GROUP_ROWS)
    t = 0
    for TILES in gl.static_range(tile.FAR_TILES if SPLIT else tile.FULL_TILES, tile.MASKED_TILES + 1):
        start, stop, gap, jump = tile.loop_bounds(TILES, program.bounds, program.keys, SPLIT, BLOCK_N)
        for x in range(start, stop, BLOCK_N):
            n0 = tile.past_gap(x, gap, jump, BLOCK_N)
            fill(program.k, t, k_tma, b, kv_head, n0)
            fill(program.v, t, v_tma, b, kv_head, n0)
            t += 1


@gluon.jit
def attend(warpgroup, program, out, lse, head, sequences, layer, SPLIT: gl.constexpr, VALUE_DIM: gl.constexpr):
    """Do the work of a warpgroup for its 64 queries."""
    BLOCK_N: gl.constexpr = program.k.tiles.shape[3]
    BLOCK_DV: gl.constexpr = program.v.tiles.shape[4]
    DTYPE: gl.constexpr = program.v.tiles.dtype
    # Of the products, and of the weights as one of their factors.
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, k_width=2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    # Of what is stored: 16 bytes of a thread lie side by side.
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_DV, BLOCK_DV // 8], [4, 1], [1, 0])

    queries, keys = program.queries, program.keys
    m0 = program.m0 + warpgroup * GROUP_ROWS
    tokens = m0 + gl.arange(0, GROUP_ROWS, ROWS)
    resident = tile.resident(tokens, queries, keys, layer.window_left, layer.window_right)
    n = tile.load_lengths(sequences, program.b, resident.positions, layer.window_left)
    row_scale = gl.full([GROUP_ROWS], layer.scale * LOG2E, gl.float32, ROWS) * query_gain(n, head, layer.gain_length)
    m_i = gl.full([GROUP_ROWS], -float("inf"), gl.float32, ROWS)
    l_i = gl.full([GROUP_ROWS], 0.0, gl.float32, ROWS)
    acc = gl.full([GROUP_ROWS, BLOCK_DV], 0.0, gl.float32, OUT)
    zeros = gl.full([GROUP_ROWS, BLOCK_N], 0.0, gl.float32, SCORES)
    q_tile = wait_for(program.q, warpgroup)  # [GROUP_ROWS, BLOCK_D]
    t = 0
    for TILES in gl.static_range(tile.FAR_TILES if SPLIT else tile.FULL_TILES, tile.MASKED_TILES + 1):
        start, stop, gap, jump = tile.loop_bounds(TILES, program.bounds, keys, SPLIT, BLOCK_N)
        for x in range(start, stop, BLOCK_N):
            n0 = tile.past_gap(x, gap, jump, BLOCK_N)
            j = keys.start + n0 + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))  # [BLOCK_N]
            k_tile = wait_for(program.k, t)  # [BLOCK_N, BLOCK_D]
            qk = warpgroup_mma(q_tile, k_tile.permute([1, 0]), zeros, use_acc=False, is_async=True)
            qk = warpgroup_mma_wait(0, deps=[qk])  # [GROUP_ROWS, BLOCK_N]
            release(program.k, t)
            _, _, a = tile.tile_logits(qk, row_scale[:, None], None, resident, j, keys.start + n0, None, head, TILES)
            p, correction, m_i, l_i = tile.softmax_step(a, m_i, l_i)
            p = gl.convert_layout(tile.cast(p, DTYPE), WEIGHTS)
            acc = acc * gl.convert_layout(correction, OUT_ROWS)[:, None]
            v_tile = wait_for(program.v, t)  # [BLOCK_N, BLOCK_DV]
            acc = warpgroup_mma(p, v_tile, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])  # [GROUP_ROWS, BLOCK_DV]
            release(program.v, t)
            t += 1

    row_weight, lse_row = tile.softmax_end(m_i, l_i)
    gl.store(lse + tokens, lse_row * LN2, mask=tokens < queries.count)
    result = tile.cast(acc * gl.convert_layout(row_weight, OUT_ROWS)[:, None], DTYPE)
    rows = m0 + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, STORED))
    columns = gl.arange(0, BLOCK_DV, gl.SliceLayout(0, STORED))
    pointers = out.pointer + rows.to(gl.int64)[:, None] * out.stride + columns[None, :]  # [GROUP_ROWS, BLOCK_DV]
    stored = (rows < queries.count)[:, None] & (columns < VALUE_DIM)[None, :]
    gl.store(pointers, gl.convert_layout(result, STORED), mask=stored)


@gluon.jit(do_not_specialize=RUNTIME_INTEGERS)
def specialized_kernel(
    q_tma, k_tma, v_tma, out, lse, parameters, sequences, dropout, strides, layer,
    num_queries, num_keys, total_queries, total_keys, query_start, key_start,
    HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    num_stages: gl.constexpr,
):  # fmt: skip
    WARPGROUPS: gl.constexpr = BLOCK_M // GROUP_ROWS
    SPLIT: gl.constexpr = tile.far_tiles_pay(
        q_tma.dtype.primitive_bitwidth, BLOCK_N,
        parameters.power is not None, parameters.rate is not None, parameters.sharpness is not None,
    )  # fmt: skip
    gl.static_assert(WARPGROUPS == 2)
    b, h, m0 = tile.query_program(num_queries, layer.num_heads, BLOCK_M)
    queries, keys = tile.load_axes(
        b, sequences, layer, num_queries, num_keys, total_queries, total_keys, query_start, key_start
    )
    before, after = layer.window_left, layer.window_right
    bounds = tile.bounds_of(m0, m0 + BLOCK_M - 1, queries, keys, before, after, False, BLOCK_N)
    head = Parameters(*[None if pointer is None else gl.load(pointer + h) for pointer in parameters])
    out = tile.rows_of(out, strides.out, queries, h)
    lse += tile.lse_rows(b, h, queries.row, layer.num_heads, num_queries, total_queries, None)
    q_ring = new_ring(q_tma, WARPGROUPS, 1)
    k_ring = new_ring(k_tma, num_stages, WARPGROUPS)
    v_ring = new_ring(v_tma, num_stages, WARPGROUPS)
    fence_async_shared()  # TMA sees barriers that are set up
    program = Program(q_ring, k_ring, v_ring, b, h, m0, queries, keys, bounds)
    gl.warp_specialize(
        [
            (attend, (0, program, out, lse, head, sequences, layer, SPLIT, VALUE_DIM)),
            (attend, (1, program, out, lse, head, sequences, layer, SPLIT, VALUE_DIM)),
            (load, (program, q_tma, k_tma, v_tma, h // layer.group_size, SPLIT)),
        ],
        [4, 1],
        [COMPUTE_REGISTERS, LOAD_REGISTERS],
    )


def serves(plan: Plan, options: Options) -> bool:
    """Whether the kernel can do a call, if q, k and v lie as TMA wants them.

    It is in half precision, of head_dims from 33 to 128, without dropout and a key bias, neither packed nor paged, and
    brings no starts or lengths of each sequence. Somebody must see each key: rows that nobody sees may hold NaN, and
    would have to be loaded as zeros.
    """
    given = options.key_bias, options.key_lengths, options.query_starts, options.key_starts, options.block_table
    if plan.packed or options.dropout_p > 0 or any(x is not None for x in given):
        return False
    if plan.traits.itemsize != 2 or not {padded(plan.head_dim), padded(plan.value_dim)} <= {64, 128}:
        return False
    first, last = options.query_start, options.query_start + plan.num_queries - 1
    left, right = options.window_left, options.window_right
    seen_from = 0 if left is None else max(0, first - left)
    seen_all = right is None or options.key_start + plan.num_keys <= last + right + 1
    return first >= 0 and options.key_start >= seen_from and seen_all


def attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: Options, plan: Plan) -> bool:
    """Do what :func:`forward.attention` does, with tensors that are turned already; return whether the kernel can.

    The configuration of the call is SPECIALIZED. out and lse are written.
    """
    config, constants = plan.tiles("forward")
    if not serves(plan, options):
        return False
    descriptors = [
        plan.descriptor(x, rows) for x, rows in ((q, GROUP_ROWS.value), (k, config.BLOCK_N), (v, config.BLOCK_N))
    ]
    if any(descriptor is None for descriptor in descriptors):
        return False
    launch(
        specialized_kernel, plan.batch * plan.heads * cdiv(plan.num_queries, config.BLOCK_M),
        (*map(_with_layout, descriptors), out, lse, *plan.shared(options)),
        (plan.strides, *plan.numbers(options)), constants | dict(num_warps=4), plan.kernels,
    )  # fmt: skip
    return True


def _with_layout(descriptor: Any) -> TensorDescriptor:
    """Return a tensor descriptor of Triton's as one of Gluon's, which knows how its tiles lie in shared memory."""
    block, dtype = descriptor.block_shape, getattr(gl, str(descriptor.base.dtype).removeprefix("torch."))
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(descriptor.base, descriptor.shape, descriptor.strides, block, layout)
