"""The CUDA kernels before and behind the blocks against their references: the same bits."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import normal, random_int8
from kernel_compare import compare, kernel_of
from kernel_fixtures import CUDA, DEVICE

from ssdi8_edge.ground.errors import Ssdi8Error
from ssdi8_edge.ops.glue import pack_rows

pytestmark = CUDA
VOCABULARY = 37


def token_ids(generator: torch.Generator, batch: int, length: int) -> torch.Tensor:
    """The first and the last row of the table among them."""
    ids = torch.randint(0, VOCABULARY, (batch, length), generator=generator, device=DEVICE)
    ids[0, 0], ids[-1, -1] = VOCABULARY - 1, 0
    return ids.to(torch.int32)


@pytest.mark.parametrize("width", [8, 768, 2560])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 5)])
def test_embedding(generator: torch.Generator, batch: int, length: int, width: int) -> None:
    table = normal(generator, VOCABULARY, width)
    ids = token_ids(generator, batch, length)
    compare("Embedding", table, ids, fractions=(0.0, 0.0))


@pytest.mark.parametrize("width", [8, 768, 2560])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 5)])
def test_embedding_int8(generator: torch.Generator, batch: int, length: int, width: int) -> None:
    packed = pack_rows(random_int8(generator, VOCABULARY, width))
    scale = torch.rand((VOCABULARY, 1), generator=generator, device=DEVICE)
    ids = token_ids(generator, batch, length)
    compare("EmbeddingInt8", packed, scale, ids, fractions=(0.0, 0.0))


@pytest.mark.parametrize("width", [8, 768, 2560])
@pytest.mark.parametrize(("batch", "length", "keep"), [(1, 1, 1), (1, 7, 1), (2, 7, 3), (3, 4, 4)])
def test_last_positions(
    generator: torch.Generator, batch: int, length: int, keep: int, width: int
) -> None:
    hidden = normal(generator, batch, length, width)
    residual = normal(generator, batch, length, width, dtype=torch.float32)
    compare("LastPositions", hidden, residual, torch.tensor(keep), fractions=(0.0, 0.0))


@pytest.mark.parametrize("vocabulary", [1, 257, 50280])
def test_logits(generator: torch.Generator, vocabulary: int) -> None:
    """Odd rows begin at any half."""
    compare("Logits", normal(generator, 2, 3, vocabulary), fractions=(0.0,))


def test_refusals(generator: torch.Generator) -> None:
    """What does not fit the vectors of a kernel is named."""
    ids = token_ids(generator, 1, 2)
    with pytest.raises(Ssdi8Error, match="embedding: d_model 12 is not a multiple of 8"):
        kernel_of("Embedding")(normal(generator, VOCABULARY, 12), ids)
    hidden = normal(generator, 1, 2, 8)
    with pytest.raises(Ssdi8Error, match=r"last_positions: .* keep 3 of length 2"):
        kernel_of("LastPositions")(hidden, hidden.float(), torch.tensor(3))
