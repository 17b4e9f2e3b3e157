"""A language model in floating point: the reference, and what calibration runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssdi8_edge.models.block import FloatBlock, Layer, RMSNorm, States
from ssdi8_edge.models.description import Description


class FloatModel(nn.Module):
    """Embedding, blocks, final norm and head; its state dict has our names of the checkpoint."""

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.description = description
        d_model, vocab_size = description.d_model, description.vocab_size
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(
            block.float_block(d_model, description.residual_eps) for block in description.blocks
        )
        self.norm_f = RMSNorm(d_model, description.residual_eps)
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if description.tie_embeddings:
            self.lm_head.weight = self.embedding.weight

    def forward(
        self, input_ids: Tensor, states: list[States] | None = None, keep: int | None = None
    ) -> tuple[Tensor, list[States]]:
        """input_ids (b, l) int64; returns logits (b, keep, vocab_size) of the last `keep` positions
        (None: of all) and the states of each block."""
        residual = self.embedding(input_ids).float()
        new_states = []
        for i, layer in enumerate(self.layers):
            residual, state = layer(residual, None if states is None else states[i])
            new_states.append(state)
        kept = residual if keep is None else residual[:, -keep:]
        hidden = self.norm_f(kept).to(self.lm_head.weight.dtype)
        return self.lm_head(hidden), new_states

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int) -> Tensor:
        """Greedy continuation of input_ids (b, l): returns (b, l + max_new_tokens)."""
        ids = [input_ids]
        states: list[States] | None = None
        for _ in range(max_new_tokens):
            logits, states = self(ids[-1], states)
            ids.append(logits[:, -1:].argmax(-1))
        return torch.cat(ids, dim=1)


def load_block(description: Description, index: int, layer: Layer) -> FloatBlock:
    """Block `index` of the model, sharing the given FP32 tensors."""
    with torch.device("meta"):
        block = description.blocks[index].float_block(description.d_model, description.residual_eps)
    block.load_state_dict(layer, assign=True)
    return block.eval().requires_grad_(False)
