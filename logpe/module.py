"""``nn.MultiheadAttention`` with a log position, and the swap of one for the other inside a model.

As in torch, L is the number of queries and S the number of keys of a sequence: Nq and Nk elsewhere in logpe.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from logpe_kernels.options import Options
from torch import Tensor, nn
from torch.fx.proxy import Proxy, TraceError

from logpe import checks, reference
from logpe.attention import log_attention
from logpe.checks import plain_bool, plain_float, plain_int
from logpe.distributed import ContextParallel
from logpe.position import LogPosition, refuse_scripting
from logpe.reference import PositionValues

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_warned: set[str] = set()


class HeadNorm(nn.RMSNorm):
    """RMSNorm in the precision of its weight, which autocast does not lower as it lowers queries and keys."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., head_dim) normalised over its last dimension, in the dtype of x."""
        weight: Tensor = self.weight
        if hasattr(weight, "device_mesh"):  # x has this rank's heads alone
            from logpe.tensor_parallel import whole_value

            weight = whole_value(weight)
        return F.rms_norm(x.to(weight.dtype), tuple(self.normalized_shape), weight, self.eps).to(x.dtype)

    def shard_heads(self, mesh: DeviceMesh, source: int | None = 0) -> None:
        """Let each rank of ``mesh`` normalise some of the heads: see :class:`logpe.HeadParallel`."""
        from torch.distributed.tensor import Replicate

        from logpe.tensor_parallel import distribute

        distribute(self, {"weight": Replicate()}, mesh, source)


class HeadSink(nn.Module):
    """A key for each head without a position, whose value is zero: a query that matches nothing may choose it.

    Its score is scale * <q, key> + bias. Both parameters start at zero, so that at first it is a key of score 0, as
    ``add_zero_attn`` of ``nn.MultiheadAttention`` gives. In an attention of one's own::

        out = log_attention(q, k, v, position, is_causal=True, sink=sink(q))

    A constant sink for each head is that of gpt-oss; one that follows from the query is one key more.

    Args:
        num_heads, head_dim: query heads, H, and the size of one, D.
        device, dtype: those of the parameters; by default torch's.

    Attributes:
        key: (H, D).
        bias: (H,).
    """

    def __init__(
        self, num_heads: int, head_dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        num_heads, head_dim = plain_int("num_heads", num_heads), plain_int("head_dim", head_dim)
        self.key = nn.Parameter(torch.empty(num_heads, head_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the parameters to zero."""
        nn.init.zeros_(self.key)
        nn.init.zeros_(self.bias)

    __prepare_scriptable__ = refuse_scripting

    def forward(self, q: Tensor, scale: float | None = None) -> Tensor:
        """Return the score of each query.

        Args:
            q: (B, H, N, D); or packed, with the heads first, (H, total, D).
            scale: of the products; 1 / sqrt(D) by default.

        Returns:
            (B, H, N), or packed (H, total), float32 or better.

        Raises:
            TypeError, ValueError: a bad argument, named.
        """
        parameters: tuple[Any, ...] = self.key, self.bias
        key, bias = (x.to_local() if hasattr(x, "device_mesh") else x for x in parameters)
        checks.check_dense("q", q)
        heads, head_dim = key.shape
        if q.dim() not in (3, 4) or q.shape[-3] != heads or q.shape[-1] != head_dim:
            raise ValueError(f"q must have shape (B, {heads}, N, {head_dim}), got {tuple(q.shape)}")
        scale = checks.resolve_scale(scale, head_dim)
        return reference.scores(q, key[..., None].to(q.dtype), scale)[..., 0] + bias[:, None]

    def shard_heads(self, mesh: DeviceMesh, source: int | None = 0) -> None:
        """Let each rank of ``mesh`` hold some of the heads: see :class:`logpe.HeadParallel`."""
        from torch.distributed.tensor import Shard

        from logpe.tensor_parallel import distribute

        distribute(self, {"key": Shard(0), "bias": Shard(0)}, mesh, source)


class LogAttention(nn.MultiheadAttention):
    """Multi-head attention with a log position: a drop-in for ``nn.MultiheadAttention``.

    The arguments up to ``dtype`` are those of ``nn.MultiheadAttention``, and so are the initialisation and the
    names of the weights. With ``position="none"`` or None it computes the same results, up to rounding.

    There are two paths to one result. The kernel serves ``need_weights=False`` with any ``key_padding_mask`` and with
    ``is_causal=True``. Everything else takes the exact eager path, which holds (B, num_heads, L, S) tensors, and warns
    once per process and reason: ``need_weights=True`` (the default, as in ``nn.MultiheadAttention``), an ``attn_mask``
    without ``is_causal``, a mask that requires a gradient. Both paths drop the same weights for the same random state.

    Args:
        position: a preset name (see :class:`LogPosition`), a LogPosition built for these heads, which many layers
            may share, or None. It becomes the submodule ``position``, in float32 whatever the dtype of the rest.
        num_kv_heads: heads of keys and values, a divisor of ``num_heads``, which is the default. With fewer,
            ``in_proj_weight`` has embed_dim + 2 * num_kv_heads * head_dim rows; the other weights of keys and values
            shrink alike.
        qk_norm: normalise q and k over head_dim, by ``nn.RMSNorm`` in the submodules ``q_norm`` and ``k_norm``.
            Scale-invariant attention (preset ``log-invariant``) assumes logits of unit variance: switch it on there,
            unless the model ensures them in another way.
        position_options: more keywords for the LogPosition that a preset name builds, such as
            ``{"query_gain": True}``. A query gain counts the tokens before a query with ``is_causal``, and else all
            keys, also where an ``attn_mask`` hides the later ones: give both where the mask is causal.
        sink: give each head a key without a position, whose value is zero, in the submodule ``sink``: a query that
            matches nothing may choose it. It goes well with a query gain, which otherwise makes such a query choose
            some other key all the same.
        context_parallel: attend across processes. Inputs, key_padding_mask and output are then those of this rank's
            tokens, and ``need_weights`` must be False. See :class:`ContextParallel`. The attribute may be set later.

    ``add_bias_kv`` and ``add_zero_attn`` append keys that have no position: they need ``position=None``.

    ``forward`` falls back on the attribute ``query_start``, which is None. Set it to 0 for cross-attention whose
    queries and keys share an axis.

    The state_dict of a ``nn.MultiheadAttention`` loads strictly. A part without any entry in it (``position.*``,
    ``q_norm.*`` and ``k_norm.*``, ``sink.*``) keeps its present values; a part with some entries must be complete. For
    the way back, drop these entries.

    Raises:
        TypeError, ValueError: a bad argument, named, with its value and what is allowed.
    """

    position: LogPosition | None
    q_norm: nn.RMSNorm | None
    k_norm: nn.RMSNorm | None
    sink: HeadSink | None
    query_start: int | Tensor | None
    context_parallel: ContextParallel | None = None  # also of modules pickled before there was one
    head_mesh: DeviceMesh | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        position: str | LogPosition | None = "log-bias-rope",
        num_kv_heads: int | None = None,
        qk_norm: bool = False,
        position_options: Mapping[str, Any] | None = None,
        sink: bool = False,
        context_parallel: ContextParallel | None = None,
    ) -> None:
        embed_dim, num_heads = plain_int("embed_dim", embed_dim), plain_int("num_heads", num_heads)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        dropout = plain_float("dropout", dropout)
        kdim = None if kdim is None else plain_int("kdim", kdim)
        vdim = None if vdim is None else plain_int("vdim", vdim)
        num_kv_heads = num_heads if num_kv_heads is None else plain_int("num_kv_heads", num_kv_heads)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must be a divisor of num_heads, {num_heads}, got {num_kv_heads}")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        if num_kv_heads != num_heads:
            self._shrink_kv(num_kv_heads * self.head_dim)
            self._qkv_same_embed_dim = False  # it would promise one weight of 3 * embed_dim rows
        self._extend(num_kv_heads, _make_position(position, self, position_options), qk_norm, sink, context_parallel)

    @classmethod
    def _from_plain(
        cls,
        plain: nn.MultiheadAttention,
        position: LogPosition | None,
        qk_norm: bool,
        sink: bool,
        context_parallel: ContextParallel | None,
    ) -> LogAttention:
        """Return a LogAttention that holds the very parameters, output projection and hooks of ``plain``."""
        attention = cls.__new__(cls)
        attention.__dict__.update(plain.__dict__)
        for name in ("_parameters", "_buffers", "_modules"):
            attention.__dict__[name] = copy.copy(plain.__dict__[name])
        attention.__dict__.pop("_compiled_call_impl", None)
        if not plain._forward_pre_hooks:  # a shared dict would put our hook on ``plain``, too: no fused inference
            attention._forward_pre_hooks = OrderedDict()
        attention._extend(plain.num_heads, position, qk_norm, sink, context_parallel)
        return attention

    def _extend(
        self,
        num_kv_heads: int,
        position: LogPosition | None,
        qk_norm: bool,
        sink: bool,
        context_parallel: ContextParallel | None,
    ) -> None:
        """Add what a ``nn.MultiheadAttention`` lacks."""
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if position is not None and position.parts and (self.bias_k is not None or self.add_zero_attn):
            name = "add_zero_attn" if self.bias_k is None else "add_bias_kv"
            raise ValueError(
                f"{name} must be False with a position, got True and the parts {', '.join(position.parts)}: "
                "the key that it appends has no position; position=None serves it"
            )
        like = self.out_proj.weight
        self.num_kv_heads = num_kv_heads
        self.position = position
        self.q_norm = self.k_norm = None
        if plain_bool("qk_norm", qk_norm):
            self.q_norm, self.k_norm = (
                HeadNorm(self.head_dim, device=like.device, dtype=like.dtype).train(self.training) for _ in range(2)
            )
        self.sink = None
        if plain_bool("sink", sink):
            heads = self.num_heads, self.head_dim
            self.sink = HeadSink(*heads, device=like.device, dtype=like.dtype).train(self.training)
        self.query_start = None
        if context_parallel is not None:
            if not isinstance(context_parallel, ContextParallel):
                name = type(context_parallel).__name__
                raise TypeError(f"context_parallel must be a ContextParallel or None, got {name}")
            if self.bias_k is not None or self.add_zero_attn:
                name = "add_zero_attn" if self.bias_k is None else "add_bias_kv"
                raise ValueError(f"{name} must be False with context_parallel, got True: it appends a key of no rank")
            self.context_parallel = context_parallel
        self._keep_forward()

    def _keep_forward(self) -> None:
        """Keep fused inference away: it would skip forward(), and so the position, but spares modules with hooks."""
        if _nothing not in self._forward_pre_hooks.values():
            self.register_forward_pre_hook(_nothing)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._modules.setdefault("sink", None)  # older pickles have none
        same = self.kdim == self.vdim == self.embed_dim and self.num_kv_heads == self.num_heads
        self._qkv_same_embed_dim = same  # older pickles always have False
        self._keep_forward()

    def merge_masks(self, *args: Any) -> NoReturn:
        """Raise RuntimeError: only fused inference calls this, and it would leave the position out."""
        raise RuntimeError(
            "fused inference would leave out the position of a LogAttention whose forward pre-hooks were cleared: call "
            "torch.backends.mha.set_fastpath_enabled(False)"
        )

    __prepare_scriptable__ = refuse_scripting

    def shard_heads(self, mesh: DeviceMesh, source: int | None = 0) -> None:
        """Share out the heads among the ranks of ``mesh``, as :class:`logpe.HeadParallel` does.

        Args:
            source: the rank of the mesh whose values count. None: every rank has them already.

        Raises:
            ValueError: the ranks do not divide the heads or the key heads, or the heads are shared out already.
        """
        from torch.distributed.tensor import Shard
        from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

        from logpe.tensor_parallel import check_heads, distribute

        if self.head_mesh is not None:
            raise ValueError("the heads of a LogAttention must be shared out once, got a mesh for them again")
        check_heads(mesh, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads)
        for module in (self.position, self.q_norm, self.k_norm, self.sink):
            if isinstance(module, LogPosition | HeadNorm | HeadSink):
                module.shard_heads(mesh, source)
        by_rows = "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"
        distribute(self, {name: Shard(0) for name in by_rows} | {"bias_k": Shard(2), "bias_v": Shard(2)}, mesh, source)
        parallelize_module(self.out_proj, mesh, RowwiseParallel(), src_data_rank=source)
        self.head_mesh = mesh

    def _shrink_kv(self, kv_dim: int) -> None:
        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(self.out_proj.weight.new_empty(shape))

        if self.in_proj_weight is not None:
            self.in_proj_weight = parameter(self.embed_dim + 2 * kv_dim, self.embed_dim)
        else:
            self.k_proj_weight = parameter(kv_dim, self.kdim)
            self.v_proj_weight = parameter(kv_dim, self.vdim)
        if self.in_proj_bias is not None:
            self.in_proj_bias = parameter(self.embed_dim + 2 * kv_dim)
        if self.bias_k is not None:
            self.bias_k, self.bias_v = parameter(1, 1, kv_dim), parameter(1, 1, kv_dim)
        self._reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as ``nn.MultiheadAttention`` does. Deferred initialisation from the meta device calls this."""
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        same = self._qkv_same_embed_dim
        self._qkv_same_embed_dim = self.in_proj_weight is not None  # what the parent's method takes it to mean
        super()._reset_parameters()
        self._qkv_same_embed_dim = same

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        query_start: int | Tensor | None = None,
        key_start: int | Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention output and weights, as ``nn.MultiheadAttention.forward`` does.

        Args:
            query: (L, B, embed_dim), or (B, L, embed_dim) with ``batch_first``, or unbatched (L, embed_dim).
            key, value: the same with S, kdim and vdim.
            key_padding_mask: (B, S), unbatched (S,). Bool, where True hides the key, or floating and added to the
                logits.
            need_weights: also return the weights, on the slow path.
            attn_mask: (L, S) or (B * num_heads, L, S). Bool, where True hides, or floating and added to the logits.
            average_attn_weights: average the weights over the heads.
            is_causal: hide the keys after each query. The first query is aligned with the first key (top-left, as in
                ``nn.MultiheadAttention``), unless ``query_start`` moves it. Together with an ``attn_mask`` it is the
                hint that this is the causal mask, which is then read only with ``need_weights``, or if it requires a
                gradient.
            query_start, key_start: position of the first query and of the first key, an int or an int tensor (B,).
                Negative positions do not exist. By default keys start at 0, and queries where the keys do. Where
                L != S without ``is_causal`` that would be a guess: with a position, query_start is then required.

        Returns:
            output: like query. weights: (B, L, S), or (B, num_heads, L, S) without ``average_attn_weights``, after
            dropout; None without ``need_weights``. A query that may see no key has zero weights, and its output is
            the bias of the output projection, where ``nn.MultiheadAttention`` returns NaN.

        Raises:
            TypeError, ValueError: a bad argument, named, with its value and what is allowed.
        """
        for x in (query, key, value):
            if isinstance(x, Proxy):
                options = dict(key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
                               average_attn_weights=average_attn_weights, is_causal=is_causal,
                               query_start=query_start, key_start=key_start)  # fmt: skip
                return self._leaf(x, (query, key, value), options)
        if self.context_parallel is not None:
            with self.context_parallel.together():
                masks = key_padding_mask, attn_mask
                return self._attend_across(query, key, value, *masks, need_weights, is_causal, query_start, key_start)
        unmasked_self_attention = query is key and key is value and attn_mask is None and key_padding_mask is None
        if query.is_nested and unmasked_self_attention and self.batch_first and query.layout == torch.strided:
            return self._attend_nested(query, need_weights, average_attn_weights, is_causal, query_start, key_start)
        length, source, batch = self._check_inputs(query, key, value, key_padding_mask)
        if self.head_mesh is not None:
            self._check_across_heads(key_padding_mask, attn_mask, need_weights)
        q, k, v = self._project(query, key, value)
        if query.dim() == 2 and key_padding_mask is not None:
            key_padding_mask = key_padding_mask[None]

        appends_keys = self.bias_k is not None or self.add_zero_attn
        is_hint = is_causal and not need_weights and not _requires_grad(attn_mask)
        if is_hint and not (appends_keys and key_padding_mask is not None):
            attn_mask = None
        if attn_mask is not None:
            _check_mask("attn_mask", attn_mask, ((length, source), (batch * self.num_heads, length, source)))
            attn_mask = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, -1))
            if self.head_mesh is not None and attn_mask.shape[1] > 1:
                attn_mask = attn_mask.chunk(self.head_mesh.size(), 1)[self.head_mesh.get_local_rank()]
        if appends_keys:  # no mask hides them, but is_causal takes them to follow all queries, as in torch
            k, v = self._append(k, self.bias_k), self._append(v, self.bias_v)
            pad = (0, k.shape[2] - source)
            key_padding_mask = None if key_padding_mask is None else F.pad(key_padding_mask, pad)
            attn_mask = None if attn_mask is None else F.pad(attn_mask, pad)

        position = self.position if self.position is not None and self.position.parts else None
        if key_start is None:
            key_start = 0
        if query_start is None:
            query_start = self.query_start
        if query_start is None:
            if position is not None and length != source and not is_causal:
                raise ValueError(
                    f"query_start is required for {length} queries and {source} keys with a position and without "
                    "is_causal: the position of the first query, on the axis of the keys (an argument or an "
                    "attribute). For cross-attention between two different sequences use position=None"
                )
            query_start = key_start
        context_length: int | Tensor | None = None
        if position is not None and "alpha" in position.parts and not is_causal:
            # n of the query gain is the number of keys, and padding must not count.
            context_length = key_start + (source if key_padding_mask is None else _visible(key_padding_mask).sum(-1))

        dropout_p, dropout_seed = checks.resolve_dropout(self.dropout if self.training else 0.0, None, q)
        if dropout_seed is not None and self.head_mesh is not None:
            dropout_seed = dropout_seed + self.head_mesh.get_local_rank()  # its heads are not those of other ranks
        weights = None
        if reason := _why_slow(key_padding_mask, need_weights, attn_mask):
            _warn_once(reason)
            out, weights = self._attend_slowly(
                q, k, v, key_padding_mask, attn_mask, query_start, key_start, is_causal, context_length, dropout_p,
                dropout_seed,
            )  # fmt: skip
            if not need_weights:
                weights = None
            elif average_attn_weights:
                weights = weights.mean(1)
        else:
            out = log_attention(
                q,
                k,
                v,
                position,
                is_causal=is_causal,
                query_start=query_start,
                key_start=key_start,
                key_mask=_key_mask(key_padding_mask),
                dropout_p=dropout_p,
                dropout_seed=dropout_seed,
                context_length=context_length,
                sink=None if self.sink is None else self.sink(q),
            )

        out = out.transpose(1, 2).flatten(-2)  # (B, L, embed_dim)
        if query.dim() == 2:
            out = out[0]
            weights = None if weights is None else weights[0]
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return self.out_proj(out), weights

    def _leaf(self, proxy: Proxy, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Return one node for a graph of torch.fx, which knows ``nn.MultiheadAttention`` as a leaf by its name."""
        tracer: Any = proxy.tracer
        if not (path := tracer.path_of_module(self)):
            raise TraceError("torch.fx cannot trace LogAttention itself: trace a model that holds it")
        return tracer.create_proxy("call_module", path, inputs, options)

    def _attend_nested(self, x: Tensor, *options: Any) -> tuple[Tensor, Tensor | None]:
        """Attend within a nested tensor, which nn.TransformerEncoder makes of a padded batch in evaluation."""
        need_weights, average_attn_weights, is_causal, query_start, key_start = options
        sequences = x.unbind()
        padded = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=x.device)
        out, weights = self.forward(
            padded,
            padded,
            padded,
            torch.arange(padded.shape[1], device=x.device) >= lengths[:, None],
            need_weights,
            None,
            average_attn_weights,
            is_causal,
            query_start=query_start,
            key_start=key_start,
        )
        return torch.nested.as_nested_tensor([o[: len(s)] for o, s in zip(out, sequences, strict=True)]), weights

    def _attend_across(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        need_weights: bool,
        is_causal: bool,
        query_start: int | Tensor | None,
        key_start: int | Tensor | None,
    ) -> tuple[Tensor, None]:
        """Attend from this rank's tokens to those of all ranks."""
        self._check_inputs(query, key, value, key_padding_mask)
        if self.head_mesh is not None:
            self._check_across_heads(key_padding_mask, None, need_weights)
            if self.training and self.dropout:
                raise ValueError(
                    f"dropout must be 0 with context_parallel and HeadParallel, got {self.dropout}: they share a seed"
                )
        if need_weights:
            raise ValueError("need_weights must be False with context_parallel, got True: no rank holds the weights")
        if attn_mask is not None and not is_causal:
            raise ValueError(
                "attn_mask must be None with context_parallel, unless is_causal says that it is the causal one"
            )
        position = self.position if self.position is not None and self.position.parts else None
        if key_padding_mask is not None:
            if position is not None and "alpha" in position.parts and not is_causal:
                raise ValueError(
                    "key_padding_mask must be None with context_parallel and a query gain, without is_causal: no rank "
                    "can count the keys"
                )
            key_padding_mask = key_padding_mask[None] if query.dim() == 2 else key_padding_mask
        key_start = 0 if key_start is None else key_start
        query_start = self.query_start if query_start is None else query_start
        if query_start is None and is_causal:
            query_start = key_start  # otherwise log_attention knows how many tokens there are
        q, k, v = self._project(query, key, value)
        out = log_attention(
            q,
            k,
            v,
            position,
            is_causal=is_causal,
            query_start=query_start,
            key_start=key_start,
            key_mask=_key_mask(key_padding_mask),
            dropout_p=self.dropout if self.training else 0.0,
            sink=None if self.sink is None else self.sink(q),
            context_parallel=self.context_parallel,
        )
        out = out.transpose(1, 2).flatten(-2)  # (B, L, embed_dim)
        if query.dim() == 2:
            out = out[0]
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return self.out_proj(out), None

    def _attend_slowly(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        query_start: int | Tensor,
        key_start: int | Tensor,
        is_causal: bool,
        context_length: int | Tensor | None,
        dropout_p: float,
        dropout_seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Run the definition, with any mask; return out and the weights (B, num_heads, L, S) in the dtype of q."""
        batch = q.shape[0]
        key_start, key_starts = checks.resolve_start("key_start", key_start, batch, q)
        query_start, query_starts = checks.resolve_start("query_start", query_start, batch, q)
        context_lengths = None
        if context_length is not None:
            context_lengths = checks.per_sequence("context_length", context_length, batch, q)
        key_bias = key_padding_mask
        if key_bias is not None and key_bias.dtype == torch.bool:
            key_bias = torch.zeros(key_bias.shape, device=q.device).masked_fill(key_bias, -torch.inf)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask
        values = PositionValues() if self.position is None else self.position(q.device)
        options = Options(
            **values._asdict(),
            query_start=query_start,
            query_starts=query_starts,
            key_start=key_start,
            key_starts=key_starts,
            key_bias=key_bias,
            context_lengths=context_lengths,
            window_right=0 if is_causal and attn_mask is None else None,
            scale=self.head_dim**-0.5,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
        )
        if self.sink is not None:  # what it scales is not rounded before
            options = options._replace(out_dtype=torch.promote_types(q.dtype, torch.float32))
        out, lse, weights = reference.attention(q, k, v, options, attn_mask=attn_mask, return_weights=True)
        if self.sink is not None:
            tokens = torch.arange(q.shape[2], device=q.device)
            out, lse_beside = reference.add_sink(out, lse, self.sink(q), options, tokens)
            weights = weights * torch.exp(lse - lse_beside)[..., None]
        return out.to(q.dtype), weights.to(q.dtype)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q (B, num_heads, L, head_dim), and k and v (B, num_kv_heads, S, head_dim): views, not copies."""
        kv_dim = self.num_kv_heads * self.head_dim
        sizes = [self.embed_dim, kv_dim, kv_dim]
        packed: Tensor | None = self.in_proj_weight
        bias: Tensor | None = self.in_proj_bias
        separate: Sequence[Any] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.head_mesh is not None:
            from logpe.tensor_parallel import rows_of_heads, share

            packed, bias = (None if x is None else rows_of_heads(x, sizes) for x in (packed, bias))
            separate = [None if x is None else x.to_local() for x in separate]
            sizes = [size // self.head_mesh.size() for size in sizes]
            shared = {id(x): share(x, self.head_mesh) for x in (query, key, value)}
            query, key, value = (shared[id(x)] for x in (query, key, value))
        if packed is not None and query is key and key is value:
            projected: Sequence[Tensor] = F.linear(query, packed, bias).split(sizes, -1)
        else:
            weights = separate if packed is None else packed.split(sizes)
            biases = (None, None, None) if bias is None else bias.split(sizes)
            inputs = query, key, value
            projected = [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]

        def by_head(x: Tensor) -> Tensor:
            x = x.unflatten(-1, (-1, self.head_dim))
            if x.dim() == 3:
                x = x[None]
            elif not self.batch_first:
                x = x.transpose(0, 1)
            return x.transpose(1, 2)

        q, k, v = map(by_head, projected)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _append(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Append the learned key or value, and that of zeros, to x (B, num_kv_heads, S, head_dim)."""
        if bias is not None and self.head_mesh is not None:
            bias = bias.to_local()  # type: ignore[attr-defined]
        appended = [] if bias is None else [bias.to(x.dtype).view(1, -1, 1, self.head_dim)]
        if self.add_zero_attn:
            appended.append(x.new_zeros(1, 1, 1, 1))
        return torch.cat([x, *(row.expand(*x.shape[:2], 1, self.head_dim) for row in appended)], dim=2)

    def _check_across_heads(
        self, key_padding_mask: Tensor | None, attn_mask: Tensor | None, need_weights: bool
    ) -> None:
        """Refuse what no rank knows, for each has some heads alone."""
        if need_weights:
            raise ValueError("need_weights must be False with HeadParallel, got True: no rank holds the weights")
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if _requires_grad(mask):
                raise ValueError(f"{name} must not require a gradient with HeadParallel: no rank has all of it")

    def _check_inputs(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
    ) -> tuple[int, int, int]:
        """Return L, S and B, which is 1 if unbatched."""
        inputs = (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim))
        for name, x, size in inputs:
            checks.check_local(name, x)
            if x.is_nested:
                raise ValueError(
                    f"{name} must not be a nested tensor, unless it is key and value too, strided, with batch_first "
                    f"and without masks: pad it, {name}.to_padded_tensor(0.0), and give a key_padding_mask"
                )
            if x.dim() not in (2, 3) or x.dim() != query.dim():
                raise ValueError(f"{name} must have 3 dimensions, or 2 like query, got shape {tuple(x.shape)}")
            if x.shape[-1] != size:
                raise ValueError(f"{name} must have {size} features, got shape {tuple(x.shape)}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"value must have the length and batch of key, {tuple(key.shape)}, got {tuple(value.shape)}"
            )
        if query.dim() == 2:
            length, source, batch = query.shape[0], key.shape[0], 1
        else:
            along, across = (1, 0) if self.batch_first else (0, 1)
            length, source, batch = query.shape[along], key.shape[along], query.shape[across]
            if key.shape[across] != batch:
                raise ValueError(f"key must have the batch size of query, {batch}, got shape {tuple(key.shape)}")
        if key_padding_mask is not None:
            shape = (source,) if query.dim() == 2 else (batch, source)
            _check_mask("key_padding_mask", key_padding_mask, (shape,))
        return length, source, batch

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # load_state_dict hands in a copy, and reads it again for the children.
        for names in (("position",), ("q_norm", "k_norm"), ("sink",)):
            parts = {f"{prefix}{name}.": getattr(self, name) for name in names if getattr(self, name) is not None}
            if not any(key.startswith(tuple(parts)) for key in state_dict):
                for part, module in parts.items():
                    state_dict.update(module.state_dict(prefix=part, keep_vars=True))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Return the settings, for print(model)."""
        text = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"
        if self.num_kv_heads != self.num_heads:
            text += f", num_kv_heads={self.num_kv_heads}"
        return f"{text}, dropout={self.dropout}, batch_first={self.batch_first}"


def replace_attention(
    model: nn.Module,
    position: str | LogPosition | None = "log-bias-rope",
    *,
    cross_attention_position: str | LogPosition | None = None,
    share_position: bool = False,
    qk_norm: bool = False,
    position_options: Mapping[str, Any] | None = None,
    sink: bool = False,
    context_parallel: ContextParallel | None = None,
) -> int:
    """Swap every ``nn.MultiheadAttention`` inside ``model`` for a :class:`LogAttention`, in place.

    The parameters stay the same objects, so that optimisers, tied weights and frozen weights go on. Dtype, device,
    dropout, mode and hooks stay, too. A module that the model holds twice is swapped once. Each
    ``nn.TransformerEncoder`` around a swapped layer stops making nested tensors, which each layer would pad anew.
    Other subclasses of ``nn.MultiheadAttention``, such as quantised ones, have a forward of their own: they are left
    alone, with a warning.

    Args:
        model: what holds the attention modules.
        position: for self-attention: a preset name, a LogPosition, or None.
        cross_attention_position: the same for cross-attention. None by default, for its queries and keys stand on two
            different axes. With a position, both axes start at 0 (the attribute ``query_start``). A module counts as
            cross-attention if it has a kdim or vdim of its own, if "cross" is in its name, or if it stands beside a
            ``self_attn``, like ``multihead_attn`` of ``nn.TransformerDecoderLayer``.
        share_position: share one set of position parameters among all layers of the same use (self or cross), shape
            and device. A given LogPosition is then used itself; otherwise each layer gets a copy.
        qk_norm, position_options, sink, context_parallel: see :class:`LogAttention`.

    Returns:
        The number of swapped modules. 0 comes with a warning.

    Raises:
        TypeError, ValueError: a bad argument, or a module that a LogAttention cannot replace. Nothing is swapped.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.MultiheadAttention):
        raise ValueError(
            f"model must hold attention modules, got {type(model).__name__} itself: construct a LogAttention in "
            "its place and load its state_dict"
        )
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, nn.MultiheadAttention)
    ]
    shared: dict[Any, LogPosition | None] = {}
    swapped: dict[nn.Module, LogAttention] = {}
    left_alone = set()
    for parent, name, plain in places:
        if type(plain) is not nn.MultiheadAttention:
            if not isinstance(plain, LogAttention):
                left_alone.add(type(plain).__name__)
            continue
        if plain in swapped:
            continue
        cross = _is_cross_attention(parent, name, plain)
        chosen = cross_attention_position if cross else position
        options = None if cross and chosen is None else position_options
        if share_position:
            shared_by = (cross, plain.num_heads, plain.head_dim, plain.out_proj.weight.device)
            if shared_by not in shared:
                shared[shared_by] = _make_position(chosen, plain, options)
            made = shared[shared_by]
        else:
            made = _make_position(copy.deepcopy(chosen), plain, options)
        swapped[plain] = LogAttention._from_plain(plain, made, qk_norm, sink, context_parallel)
        if cross and made is not None:
            swapped[plain].query_start = 0
    for parent, name, plain in places:
        if plain in swapped:
            setattr(parent, name, swapped[plain])
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, LogAttention) for m in module.modules()):
            module.enable_nested_tensor = module.use_nested_tensor = False
    if left_alone or not swapped:
        note = f"; left alone: {', '.join(sorted(left_alone))}" if left_alone else ""
        warnings.warn(f"replace_attention swapped {len(swapped)} nn.MultiheadAttention modules{note}", stacklevel=2)
    return len(swapped)


def _is_cross_attention(parent: nn.Module, name: str, module: nn.MultiheadAttention) -> bool:
    own_sizes = module.kdim != module.embed_dim or module.vdim != module.embed_dim
    beside = isinstance(getattr(parent, "self_attn", None), nn.Module) and name != "self_attn"
    return own_sizes or beside or "cross" in name.lower()


def _make_position(
    position: str | LogPosition | None, module: nn.MultiheadAttention, options: Mapping[str, Any] | None
) -> LogPosition | None:
    """Return the position of ``module``, on its device and in its mode; None if a preset has no parts."""
    heads, head_dim, device = module.num_heads, module.head_dim, module.out_proj.weight.device
    if isinstance(position, str):
        made = LogPosition(heads, head_dim, position, device=device, **(options or {})).train(module.training)
        return made if made.parts else None
    if position is not None and not isinstance(position, LogPosition):
        raise TypeError(f"position must be a preset name, a LogPosition or None, got {type(position).__name__}")
    if options:
        raise ValueError(f"position_options must be empty unless position is the name of a preset, got {dict(options)}")
    if position is None:
        return None
    if (position.num_heads, position.head_dim) != (heads, head_dim):
        raise ValueError(
            f"position must be built for {heads} heads and head_dim {head_dim}, "
            f"got {position.num_heads} heads and head_dim {position.head_dim}"
        )
    return position.to(device)


def _nothing(module: nn.Module, inputs: Any) -> None:
    """Do nothing, as the hook of LogAttention._keep_forward. Pickled models know it by this name."""


def _visible(key_padding_mask: Tensor) -> Tensor:
    """Return which keys the mask does not hide, bool."""
    return ~key_padding_mask if key_padding_mask.dtype == torch.bool else key_padding_mask != -torch.inf


def _key_mask(key_padding_mask: Tensor | None) -> Tensor | None:
    """Return the mask as log_attention takes it."""
    if key_padding_mask is None or key_padding_mask.dtype != torch.bool:
        return None if key_padding_mask is None else key_padding_mask.detach()
    return _visible(key_padding_mask)


def _why_slow(key_padding_mask: Tensor | None, need_weights: bool, attn_mask: Tensor | None) -> str | None:
    """Return what the kernel cannot serve, or None if it can serve all."""
    if need_weights:
        return "need_weights=True (say need_weights=False where the weights are not used)"
    if _requires_grad(attn_mask) or _requires_grad(key_padding_mask):
        return "a mask that requires a gradient"
    if attn_mask is not None:
        return "an arbitrary attn_mask (say is_causal=True for a causal one, key_padding_mask for padding)"
    return None


def _requires_grad(mask: Tensor | None) -> bool:
    return mask is not None and mask.requires_grad and torch.is_grad_enabled()


def _warn_once(reason: str) -> None:
    if torch.compiler.is_compiling() or reason in _warned:
        return
    _warned.add(reason)
    warnings.warn(
        f"LogAttention takes the slow path, exact but with O(L * S) memory: the kernel cannot serve {reason}. "
        "This is said once.",
        stacklevel=6,  # the caller of the module
    )


def _check_mask(name: str, mask: Tensor, shapes: Sequence[tuple[int, ...]]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be bool or floating, got {mask.dtype}")
    if mask.shape not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}")
