"""Self-attention as ``torch.nn.MultiheadAttention`` computes it, spelled out: its linear layers can run in lanes."""

import torch
import torch.nn.functional as F
from torch import Tensor


def self_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None] | None:
    """What ``F.multi_head_attention_forward`` returns for (tokens, batch, features); None for its other forms: keys or
    values that are not the queries, masks, added keys, separate weights."""
    others = (bias_k, bias_v, key_padding_mask, attn_mask, static_k, static_v)
    if any(tensor is not None for tensor in others) or add_zero_attn or use_separate_proj_weight or is_causal:
        return None
    if not (query is key is value) or query.dim() != 3 or in_proj_weight is None or embed_dim_to_check % num_heads:
        return None
    tokens, batch, features = query.shape
    dropout = dropout_p if training else 0.0
    joined = F.linear(query, in_proj_weight, in_proj_bias).view(tokens, batch, 3, num_heads, features // num_heads)
    q, k, v = joined.permute(2, 1, 3, 0, 4).unbind(0)
    weights = None
    if need_weights:
        scores = torch.matmul(q * (features // num_heads) ** -0.5, k.transpose(-2, -1))
        weights = F.dropout(F.softmax(scores, dim=-1), dropout) if dropout else F.softmax(scores, dim=-1)
        mixed = torch.matmul(weights, v)
        weights = weights.mean(dim=1) if average_attn_weights else weights
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    mixed = mixed.permute(2, 0, 1, 3).reshape(tokens, batch, features)
    return F.linear(mixed, out_proj_weight, out_proj_bias), weights
