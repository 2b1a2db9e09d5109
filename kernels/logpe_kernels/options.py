"""What attention takes beside q, k and v: listed here, and nowhere else; and how its output lies. Needs torch alone."""

from typing import Final, NamedTuple

import torch
from torch import Tensor

MAX_HEAD_DIM = 256  # of q and k, and of v, whose head_dim may be another
NUM_LEARNABLE: Final = 4  # the first fields of Options, which are the parts that are learned
NUM_POSITIONAL: Final = 5  # the first fields of Options, which a position gives: those, and theta
NUM_TENSORS: Final = 14  # the first fields of Options, which are tensors


class Options(NamedTuple):
    """The options of a call, for every backend; the operator's schema follows from it.

    Shapes are for B sequences and Hq query heads. Tensors are contiguous and on the device of q. A tensor of starts
    overrules the number of the same name.
    """

    power: Tensor | None = None  # (Hq,), float32, as the next three
    rate: Tensor | None = None
    sharpness: Tensor | None = None
    alpha: Tensor | None = None
    theta: Tensor | None = None  # float64 (planes,): the angle of each rotated plane per unit of f_c
    query_starts: Tensor | None = None  # int32 (B,), as the next two: position of the first query
    key_starts: Tensor | None = None
    key_lengths: Tensor | None = None  # keys at this index and beyond are hidden
    key_bias: Tensor | None = None  # (B, Nk), float32: added to the logits; -inf hides a key
    context_lengths: Tensor | None = None  # int32 (B,): n of the query gain; None: the position of the query
    block_table: Tensor | None = None  # int32 (B, max_pages): k, v: (num_pages, Hkv, page_size, D or Dv)
    cu_seqlens_q: Tensor | None = None  # int32 (B + 1,): q is packed, (total_q, Hq, D)
    cu_seqlens_k: Tensor | None = None
    dropout_seed: Tensor | None = None  # int64, one element
    query_start: int = 0  # position of the first query
    key_start: int = 0
    window_left: int | None = None  # the query at i sees the keys from i - left to i + right; None: unlimited
    window_right: int | None = None  # 0: causal
    max_seqlen_q: int = 0  # of packed sequences: longer ones are cut there
    max_seqlen_k: int = 0
    rotary_scale: float = 1.0  # c of f_c, in tokens
    gain_length: float = 512.0  # n0 of the query gain, in tokens
    scale: float = 1.0  # of the scores
    dropout_p: float = 0.0  # probability to drop a weight
    out_dtype: torch.dtype | None = None  # None: that of q


LEARNABLE_PARTS = Options._fields[:NUM_LEARNABLE]


def new_output(x: Tensor, zeros: bool, size: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Return an output laid out like x (..., D), or as (..., size) would be in the layout of x.

    zeros: whether it starts from zeros, as packed ones do: tokens outside every sequence keep them. dtype: by default
    that of x.
    """
    if size is None or size == x.shape[-1]:
        return torch.zeros_like(x, dtype=dtype) if zeros else torch.empty_like(x, dtype=dtype)
    rows = torch.empty_like(x[..., 0], device="meta")
    shape, strides = (*rows.shape, size), (*(size * stride for stride in rows.stride()), 1)
    out = torch.empty_strided(shape, strides, dtype=dtype or x.dtype, device=x.device)
    return out.zero_() if zeros else out
