"""A plain flash-attention forward kernel without a position, as tutorials write it: what ours is compared with."""

from __future__ import annotations

import triton
import triton.language as tl
from logpe_kernels import configs
from torch import Tensor


@triton.jit
def forward_kernel(
    q, k, v, out, lse, scale, length,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Attend from one tile of queries to all keys that it may see; contiguous tensors (B, H, N, D), D = BLOCK_D."""
    m0 = tl.program_id(0) * BLOCK_M
    start = tl.program_id(1).to(tl.int64) * length * HEAD_DIM
    rows, columns, features = m0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    tile_of_q = start + rows[:, None] * HEAD_DIM + features[None, :]
    q_tile = tl.load(q + tile_of_q, mask=rows[:, None] < length, other=0.0)  # [BLOCK_M, BLOCK_D]
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    full_end = m0 // BLOCK_N * BLOCK_N if CAUSAL else length // BLOCK_N * BLOCK_N
    end = tl.minimum(m0 + BLOCK_M, length) if CAUSAL else length
    for MASKED in tl.static_range(2):
        for n0 in range(full_end if MASKED else 0, end if MASKED else full_end, BLOCK_N):
            tokens = n0 + columns
            tile_of_k = start + tokens[:, None] * HEAD_DIM + features[None, :]
            if MASKED:
                k_tile = tl.load(k + tile_of_k, mask=tokens[:, None] < length, other=0.0)  # [BLOCK_N, BLOCK_D]
                v_tile = tl.load(v + tile_of_k, mask=tokens[:, None] < length, other=0.0)
            else:
                k_tile = tl.load(k + tile_of_k)
                v_tile = tl.load(v + tile_of_k)
            a = tl.dot(q_tile, k_tile.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
            if MASKED:
                seen = (tokens[None, :] <= rows[:, None]) if CAUSAL else (tokens[None, :] < length)
                a = tl.where(seen, a, -float("inf"))
            m_new = tl.maximum(m_i, tl.max(a, 1) * scale)
            p = tl.exp2(a * scale - m_new[:, None])
            correction = tl.exp2(m_i - m_new)
            l_i = l_i * correction + tl.sum(p, 1)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * correction[:, None], input_precision="ieee")
            m_i = m_new
    tl.store(out + tile_of_q, (acc / l_i[:, None]).to(out.dtype.element_ty), mask=rows[:, None] < length)
    tl.store(lse + tl.program_id(1) * length + rows, m_i + tl.log2(l_i), mask=rows < length)


def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool) -> None:
    """Launch the kernel on contiguous tensors (B, H, N, D), with the tiles that ours takes without a position.

    D is a power of two from 16 on. lse, float32 (B, H, N), is in units of log2.
    """
    batch, heads, length, head_dim = q.shape
    config = configs.lookup("forward", configs.traits(q.device, q.element_size(), head_dim, (), causal, length))
    grid = (triton.cdiv(length, config.BLOCK_M), batch * heads)
    scale = head_dim**-0.5 * 1.4426950408889634  # log2 e
    forward_kernel[grid](
        q, k, v, out, lse, scale, length, CAUSAL=causal, HEAD_DIM=head_dim, BLOCK_D=head_dim, enable_fp_fusion=True,
        **config.launch(),
    )  # fmt: skip
