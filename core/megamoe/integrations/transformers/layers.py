"""The forwards that replace a DeepSeek-V4 model's own, one class for each kind of module.

They read the model's own parameters and submodules, so whatever is not replaced (shared expert, projections,
compressors, indexer) runs as it did, hooks included.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Attention,
    DeepseekV4DecoderLayer,
    DeepseekV4HashRouter,
    DeepseekV4Model,
    DeepseekV4RotaryEmbedding,
    DeepseekV4SparseMoeBlock,
    DeepseekV4TopKRouter,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from megamoe.errors import ArgumentError
from megamoe.integrations.transformers.kv import KVState, PagedCaches
from megamoe.integrations.transformers.scope import check_inputs, current_scope, forward_scope
from megamoe.nn.attention import attend, attend_quantized, indices_of
from megamoe.nn.attention_output import AttentionOutput
from megamoe.nn.experts import Experts
from megamoe.nn.hyper_connections import HyperSite, advance, enter, leave
from megamoe.numerics.nvfp4 import NVFP4Tensor
from megamoe.ops import op


class ModelForward:
    """DeepseekV4Model.forward within the scope of one pass, without gradients.

    Args:
        module: The DeepseekV4Model.
        run: Its own forward.
        session: Context manager that puts a configuration in force.
    """

    def __init__(self, module: DeepseekV4Model, run: Callable[..., Any], session: Callable[[], Any]) -> None:
        self.module, self.run, self.session = module, run, session
        self.__signature__ = inspect.signature(run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See DeepseekV4Model.forward."""
        check_inputs(self.module, self.__signature__.bind_partial(*args, **kwargs).arguments)
        with self.session(), forward_scope(self.module.rotary_emb), torch.no_grad():
            return self.run(*args, **kwargs)


class DecoderForward:
    """DeepseekV4DecoderLayer.forward with every post, mix, collapse, norm and quantise in one mhc_quant.

    The last one of a layer already enters the attention site of the next layer; what it finds there is left in the
    scope, and the next layer takes it if it is called with the very streams that this layer returned.

    Args:
        module: The layer.
        attention: Its attention site.
        ffn: Its ffn site.
        following: The attention site of the next layer; None for the last, or where the next is on another device.
        normed_enc: Encode scale of the ffn's input, fp32 (); None quantises nothing.
        following_enc: Encode scale at `following`, whose NVFP4 output nobody reads yet; None quantises nothing.
        feeds_experts: The layer's MoE block takes the quantised input.
        rotary: The model's rotary embedding.
    """

    def __init__(
        self,
        module: DeepseekV4DecoderLayer,
        attention: HyperSite,
        ffn: HyperSite,
        following: HyperSite | None,
        normed_enc: Tensor | None,
        following_enc: Tensor | None,
        feeds_experts: bool,
        rotary: DeepseekV4RotaryEmbedding,
    ) -> None:
        self.module, self.attention, self.ffn, self.following = module, attention, ffn, following
        self.normed_enc, self.following_enc = normed_enc, following_enc
        self.feeds_experts, self.rotary = feeds_experts, rotary

    def __call__(self, hidden_states: Tensor, input_ids: Tensor | None = None, **kwargs: Any) -> Tensor:
        """See DeepseekV4DecoderLayer.forward; hidden_states and the result are (B, S, n, H)."""
        batch, length, _, hidden = hidden_states.shape
        layer, scope = self.module, current_scope(self.rotary)
        x = hidden_states.flatten(0, 1)  # (T, n, H)
        site = scope.take(layer.layer_idx, hidden_states) or enter(x, self.attention)
        f, _ = layer.self_attn(site.normed.view(batch, length, hidden), **kwargs)
        ffn = advance(x, _rows(f), site.post, site.comb, self.ffn, self.normed_enc)
        quantized = {"quantized": ffn.quantized} if self.feeds_experts else {}
        f = _rows(layer.mlp(ffn.normed.view(batch, length, hidden), input_ids=input_ids, **quantized))
        if self.following is None:
            return leave(ffn.residual, f, ffn.post, ffn.comb).view_as(hidden_states)
        out = advance(ffn.residual, f, ffn.post, ffn.comb, self.following, self.following_enc)
        streams = out.residual.view_as(hidden_states)
        scope.hand_over(layer.layer_idx + 1, streams, out)
        return streams


class RouterForward:
    """Forward of a top-k or hash router: the model's own logits, then scores, choice and weights in one moe_route.

    Scores are fp32 whatever the logits are, as in DeepSeek's reference; of equal ones the lower expert is chosen.

    Args:
        module: The router.
    """

    def __init__(self, module: DeepseekV4TopKRouter | DeepseekV4HashRouter) -> None:
        self.module = module

    def __call__(self, hidden_states: Tensor, input_ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See DeepseekV4TopKRouter.forward and DeepseekV4HashRouter.forward; the weights are fp32, indices int32."""
        router = self.module
        logits = torch.nn.functional.linear(hidden_states.reshape(-1, router.hidden_dim), router.weight)
        options = {"top_k": router.top_k, "scaling": router.routed_scaling_factor}
        if isinstance(router, DeepseekV4HashRouter):
            if input_ids is None:
                raise ArgumentError("input_ids", "None", "the token ids that a hash router looks up")
            ids = input_ids.reshape(-1).contiguous()
            indices, weights = op("moe_route")(logits.float(), None, ids, router.tid2eid, **options)
        else:
            indices, weights = op("moe_route")(logits.float(), router.e_score_correction_bias.float(), **options)
        return logits, weights, indices


class MoeForward:
    """DeepseekV4SparseMoeBlock.forward with the routed experts from megamoe; router and shared expert are the model's.

    Args:
        module: The block.
        experts: Its routed experts.
    """

    def __init__(self, module: DeepseekV4SparseMoeBlock, experts: Experts) -> None:
        self.module, self.experts = module, experts

    def __call__(
        self, hidden_states: Tensor, input_ids: Tensor | None = None, *, quantized: NVFP4Tensor | None = None
    ) -> Tensor:
        """See DeepseekV4SparseMoeBlock.forward; `quantized` is hidden_states as (T, H) in NVFP4, where it exists."""
        block = self.module
        routed_by = (hidden_states, input_ids) if block.is_hash else (hidden_states,)
        _, weights, indices = block.gate(*routed_by)
        rows = _rows(hidden_states) if quantized is None else quantized
        routed: Tensor = self.experts(rows, indices, weights.float(), dtype=hidden_states.dtype)
        shared: Tensor = block.shared_experts(hidden_states)
        return routed.view_as(hidden_states) + shared


class AttentionForward:
    """DeepseekV4Attention.forward with core attention and output path from megamoe, each as far as it is switched on.

    Args:
        module: The attention module.
        rotary: The model's rotary embedding.
        prefill: Prompts go through megamoe's attention; False leaves them to the model's own attention function.
        caches: NVFP4 caches for single-token steps through fp4_kv_decode; None treats a step like a prompt.
        output: Inverse RoPE, wo_a and wo_b; None leaves them to the model.
    """

    def __init__(
        self,
        module: DeepseekV4Attention,
        rotary: DeepseekV4RotaryEmbedding,
        *,
        prefill: bool,
        caches: PagedCaches | None,
        output: AttentionOutput | None,
    ) -> None:
        self.module, self.rotary = module, rotary
        self.prefill, self.caches, self.output = prefill, caches, output
        self.sink = module.sinks.detach().float().contiguous()

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: dict[str, tuple[Tensor, Tensor]],
        position_ids: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """See DeepseekV4Attention.forward; attention weights are not returned unless the model's own function ran."""
        attn, scope = self.module, current_scope(self.rotary)
        batch, length = hidden_states.shape[:2]
        shape = (batch, length, -1, attn.head_dim)
        cos, sin = scope.table(attn.rope_layer_type, hidden_states, position_ids)

        q_residual = attn.q_a_norm(attn.q_a_proj(hidden_states))
        q = attn.q_b_norm(attn.q_b_proj(q_residual).view(shape).transpose(1, 2))
        q = apply_rotary_pos_emb(q, cos, sin)  # (B, heads, S, D)
        new = attn.kv_norm(attn.kv_proj(hidden_states)).view(shape).transpose(1, 2)
        new = apply_rotary_pos_emb(new, cos, sin)  # (B, 1, S, D)

        state = self._decode_state(past_key_values, length)
        kv = new if past_key_values is None else past_key_values.update(new, new, attn.layer_idx)[0]
        compressed, bias = None, None
        if attn.compressor is not None:
            compressed, bias = attn.compressor(hidden_states, q_residual, position_ids, past_key_values, attn.layer_idx)

        weights = None
        visible = None if bias is None else (bias == 0)[:, 0]  # (B, S, entries)
        if state is not None:
            picks = None if visible is None else indices_of(visible, attn.config.index_topk)
            o = state.step(
                past_key_values.layers[attn.layer_idx], _heads_last(q), _heads_last(new), picks, self.sink, attn.scaling
            )
        elif self.prefill and self.output is not None and self.output.o_scale_enc is not None:
            entries = None if compressed is None else _heads_last(compressed)
            return self._attend_and_project(q, kv, entries, visible, cos, sin).view_as(hidden_states), None
        elif self.prefill:
            entries = None if compressed is None else _heads_last(compressed)
            o = attend(
                _heads_last(q),
                _heads_last(kv),
                self.sink,
                softmax_scale=attn.scaling,
                window=attn.sliding_window,
                compressed=entries,
                visible=visible,
            )
        else:
            o, weights = self._own_core(q, kv, compressed, bias, attention_mask, kwargs)
        return self._project(o, cos, sin, hidden_states), weights

    def _decode_state(self, cache: Any, length: int) -> KVState | None:
        """The NVFP4 cache of this layer, in step with the model's own, when this is a step of decoding."""
        index = self.module.layer_idx
        if self.caches is None or cache is None or length != 1 or cache.get_seq_length(index) == 0:
            return None
        return self.caches.in_step_with(cache.layers[index])

    def _project(self, o: Tensor, cos: Tensor, sin: Tensor, like: Tensor) -> Tensor:
        """Inverse RoPE, wo_a and wo_b on o (B, S, heads, D)."""
        batch, length = o.shape[:2]
        if self.output is not None:
            y: Tensor = self.output(_rows(o), *_turns(batch, cos, sin))
            return y.view_as(like)
        attn = self.module
        o = apply_rotary_pos_emb(o, cos, -sin, unsqueeze_dim=2)
        z = attn.o_a_proj(o.reshape(batch, length, attn.config.o_groups, -1)).flatten(2)
        projected: Tensor = attn.o_b_proj(z)
        return projected

    def _attend_and_project(
        self, q: Tensor, kv: Tensor, entries: Tensor | None, visible: Tensor | None, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """Core attention, inverse RoPE and quantisation in one op or two, wo_a and wo_b: (B * S, H)."""
        attn, output = self.module, self.output
        assert output is not None and output.o_scale_enc is not None  # noqa: PT018 (the caller looked)
        rows = attend_quantized(
            _heads_last(q),
            _heads_last(kv),
            *_turns(q.shape[0], cos, sin),
            output.o_scale_enc,
            self.sink,
            groups=output.groups,
            softmax_scale=attn.scaling,
            window=attn.sliding_window,
            compressed=entries,
            visible=visible,
        )
        return output.project(rows, q.dtype)

    def _own_core(
        self, q: Tensor, kv: Tensor, compressed: Tensor | None, bias: Tensor | None, mask: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Core attention by the model's own attention function: out (B, S, heads, D) and its weights."""
        attn = self.module
        if compressed is not None:
            kv = torch.cat([kv, compressed], dim=2)
        if isinstance(mask, Tensor) and kv.shape[2] > mask.shape[-1]:
            extra = kv.shape[2] - mask.shape[-1]
            added = mask.new_zeros((*mask.shape[:-1], extra)) if bias is None else bias.to(mask.dtype)
            mask = torch.cat([mask.expand(*added.shape[:-1], -1), added], dim=-1)
        run = ALL_ATTENTION_FUNCTIONS.get_interface(attn.config._attn_implementation, eager_attention_forward)
        out: tuple[Tensor, Tensor | None] = run(
            attn,
            q,
            kv,
            kv,
            mask,
            dropout=0.0,
            scaling=attn.scaling,
            sliding_window=attn.sliding_window,
            s_aux=attn.sinks,
            **kwargs,
        )
        return out


def _heads_last(x: Tensor) -> Tensor:
    """(B, heads, S, D) to (B, S, heads, D)."""
    return x.transpose(1, 2).contiguous()


def _turns(batch: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of a batch in the tables (B or 1, S, R/2), and the tables as rows."""
    tables, length = cos.shape[:2]
    rows = torch.arange(tables * length, dtype=torch.int32, device=cos.device)
    return rows.repeat(batch // tables), _rows(cos), _rows(sin)


def _rows(x: Tensor) -> Tensor:
    """(B, S, ...) to (B * S, ...)."""
    return x.flatten(0, 1).contiguous()
