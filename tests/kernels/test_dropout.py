"""Philox against its published vectors and an independent NumPy version; laws of the masks."""

import numpy as np
import pytest
import torch

from bioinstruct.kernels import Branch, lora_linear
from bioinstruct.kernels.dropout import Dropout, philox

ONES = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)


# the known answers of the Random123 distribution: rounds, counter, key, result
@pytest.mark.parametrize(
    ("rounds", "counter", "key", "answer"),
    [
        (7, (0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (10, (0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (10, (ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (10, PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_published_vectors(
    rounds: int, counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    words = philox(tuple(torch.tensor(c) for c in counter), key, rounds)  # type: ignore[arg-type]
    assert tuple(int(word) for word in words) == answer


def numpy_mask(p: float, seed: int, position: int, draw: int, site: int, K: int) -> np.ndarray:
    """One row of a mask, by big integers and without vectors."""
    q, row = round(65536 * p), []
    for column in range(0, K, 8):
        c, k = [column // 8, site, position, draw], [seed, 0]
        for _ in range(7):
            a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [(b >> 32) ^ c[1] ^ k[0], b & ONES, (a >> 32) ^ c[3] ^ k[1], a & ONES]
            k = [(k[0] + 0x9E3779B9) & ONES, (k[1] + 0xBB67AE85) & ONES]
        for word in c:
            row += [word & 0xFFFF, word >> 16]
    keep = np.array(row[:K]) >= q
    return keep * (65536 / (65536 - q))


def test_masks_equal_an_independent_version() -> None:
    positions, draws = torch.tensor([0, 1, 2, 0, 4000]), torch.tensor([5, 5, 5, 6, 2**31 + 1])
    mask = Dropout(0.1, 4242424242, positions, draws).mask(site=17, K=21, dtype=torch.float64)
    rows = zip(positions.tolist(), draws.tolist(), strict=True)
    exact = np.stack([numpy_mask(0.1, 4242424242, t, d, 17, 21) for t, d in rows])
    np.testing.assert_array_equal(mask.numpy(), exact)


def test_masks_do_not_depend_on_the_pack() -> None:
    positions, draws = torch.arange(50) % 10, torch.arange(50) // 10
    whole = Dropout(0.3, 1, positions, draws).mask(3, 24, torch.float32)
    part = Dropout(0.3, 1, positions[20:30], draws[20:30]).mask(3, 24, torch.float32)
    assert torch.equal(whole[20:30], part)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_rate_and_mean(p: float) -> None:
    mask = Dropout(p, 9, torch.arange(2000), torch.zeros(2000).long()).mask(0, 100, torch.float64)
    dropped = float((mask == 0).double().mean())
    assert abs(dropped - p) < 4 * (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(float(mask.mean()) - 1) < 0.01


def test_sites_and_draws_differ() -> None:
    zero = torch.zeros(64).long()
    first = Dropout(0.5, 1, torch.arange(64), zero)
    other = Dropout(0.5, 1, torch.arange(64), zero + 1)
    assert not torch.equal(first.mask(0, 64, torch.float32), first.mask(1, 64, torch.float32))
    assert not torch.equal(first.mask(0, 64, torch.float32), other.mask(0, 64, torch.float32))


@pytest.mark.parametrize("per_module", [False, True])
def test_projections_share_a_mask_or_have_their_own(per_module: bool) -> None:
    """Two branches that copy their masked input, against the independent version of the masks."""
    positions, draws = torch.arange(6), torch.full((6,), 9)
    dropout = Dropout(0.4, 77, positions, draws, per_module)
    x, one = torch.randn(6, 16, generator=torch.Generator().manual_seed(0)).double(), torch.eye(16)
    masters = [one.double().clone().requires_grad_() for _ in range(4)]
    # the second of three projections has no branch
    branches = [Branch(*masters[:2], 0, number=0), Branch(*masters[2:], 32, number=2)]
    y = lora_linear(x, torch.zeros(48, 16).double(), branches, 1.0, dropout, site=5)
    sites = [5 + ((1 + n) << 24) for n in (0, 2)] if per_module else [5, 5]
    for site, rows in zip(sites, (slice(16), slice(32, 48)), strict=True):
        mask = np.stack([numpy_mask(0.4, 77, t, 9, site, 16) for t in range(6)])
        np.testing.assert_allclose(y[:, rows].detach().numpy(), x.numpy() * mask, rtol=1e-12)
    assert not y[:, 16:32].any()
    y.sum().backward()
    for site, a in zip(sites, masters[::2], strict=True):
        mask = np.stack([numpy_mask(0.4, 77, t, 9, site, 16) for t in range(6)])
        exact = np.broadcast_to((x.numpy() * mask).sum(0), (16, 16))
        assert a.grad is not None
        np.testing.assert_allclose(a.grad.numpy(), exact, rtol=1e-12)
