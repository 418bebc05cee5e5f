from dataclasses import dataclass

import pytest
import torch

from fastm3ae.kernels import random_patch_order, random_patch_order_from_seed
from fastm3ae.kernels.random_patch_order import philox_noise, random_patch_order_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@dataclass(frozen=True)
class Case:
    batch_size: int
    num_patches: int
    num_kept: int

    def noise(self, device="cpu", dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        return torch.rand(self.batch_size, self.num_patches, generator=generator, dtype=dtype).to(device)

    def hard_noise(self, device="cpu", dtype=torch.float32):
        """Ties, both zeros, both infinities and NaN among the numbers."""
        noise = self.noise("cpu", dtype)
        for first, value in enumerate((0.5, 0.0, -0.0, torch.inf, -torch.inf, torch.nan)):
            noise[:, first::11] = value
        return noise.to(device)

    @property
    def sizes(self):
        return {"batch_size": self.batch_size, "num_patches": self.num_patches, "num_kept": self.num_kept}


CASES = {
    "one_hidden": Case(1, 1, 0),
    "one_kept": Case(1, 1, 1),
    "no_samples": Case(0, 5, 2),
    "no_patches": Case(3, 0, 0),
    "odd": Case(3, 15, 4),
    "prime": Case(5, 131, 37),
    "all_kept": Case(2, 64, 64),
    "none_kept": Case(2, 65, 0),
    "official": Case(4, 324, 81),
}
SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF)
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_device = pytest.mark.parametrize("device", DEVICES)
ODD = CASES["odd"]


def assert_all_equal(got, want):
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())


@each_case
@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_pythons_sort(case, device, dtype):
    for noise in (case.noise(device, dtype), case.hard_noise(device, dtype)):
        keep, restore, is_hidden = random_patch_order(noise, case.num_kept)
        for b, row in enumerate(noise.tolist()):
            # A tuple with NaN in it would compare as False with every other.
            keys = [(x != x, 0.0 if x != x else x, n) for n, x in enumerate(row)]
            order = [n for _, _, n in sorted(keys)]
            assert keep[b].tolist() == order[: case.num_kept]
            assert restore[b].tolist() == [order.index(n) for n in range(len(row))]
        assert torch.equal(is_hidden, restore >= case.num_kept)
        assert keep.shape == (case.batch_size, case.num_kept) and keep.dtype == restore.dtype == torch.int64


@each_case
@each_device
def test_agrees_with_the_reference(case, device):
    noise = case.hard_noise(device)
    assert_all_equal(random_patch_order(noise, case.num_kept), random_patch_order_reference(noise, case.num_kept))


@each_case
@each_device
@pytest.mark.parametrize("seed", SEEDS)
def test_order_from_a_seed_is_that_of_the_noise(case, device, seed):
    seed = torch.tensor(seed)
    noise = philox_noise(seed, case.batch_size, case.num_patches)
    got = random_patch_order_from_seed(seed.to(device), **case.sizes)
    assert_all_equal(got, random_patch_order_reference(noise, case.num_kept))


def philox(counter, key):
    """Philox-4x32-10 in Python's integers."""
    c, k = counter, key
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = (b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32
        k = (k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32
    return c


@pytest.mark.parametrize("seed", SEEDS)
def test_philox(seed):
    # The known answers that Random123 publishes.
    assert philox((0,) * 4, (0,) * 2) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((2**32 - 1,) * 4, (2**32 - 1,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    key = seed % 2**32, (seed >> 32) % 2**32
    want = [[philox((n, b, 0, 0), key)[0] for n in range(7)] for b in range(3)]
    assert philox_noise(torch.tensor(seed), 3, 7).tolist() == want


def test_a_samples_order_does_not_depend_on_the_batch():
    seed = torch.tensor(5)
    small = random_patch_order_from_seed(seed, batch_size=3, num_patches=50, num_kept=7)
    large = random_patch_order_from_seed(seed, batch_size=8, num_patches=50, num_kept=7)
    assert_all_equal(small, [x[:3] for x in large])
    assert large[0].unique(dim=0).shape[0] == 8
    other = random_patch_order_from_seed(seed + 1, batch_size=8, num_patches=50, num_kept=7)
    assert not torch.equal(large[0], other[0])


@each_device
def test_every_patch_is_kept_equally_often(device):
    seed = torch.tensor(7, device=device)
    B, N, K = 4000, 24, 6
    keep, _, is_hidden = random_patch_order_from_seed(seed, batch_size=B, num_patches=N, num_kept=K)
    deviation = (B * K / N * (1 - K / N)) ** 0.5
    assert ((~is_hidden).sum(0) - B * K / N).abs().max() < 4.5 * deviation
    first = keep[:, 0].bincount(minlength=N)
    assert (first - B / N).abs().max() < 4.5 * (B / N) ** 0.5


@each_device
def test_opcheck(device):
    torch.library.opcheck(torch.ops.fastm3ae.random_patch_order.default, (ODD.noise(device), 4))
    seed = torch.tensor(3, device=device)
    torch.library.opcheck(torch.ops.fastm3ae.random_patch_order_from_seed.default, (seed, 3, 15, 4))


@each_device
def test_compiles_into_one_graph(device):
    noise, seed = ODD.noise(device), torch.tensor(3, device=device)
    got = torch.compile(random_patch_order, fullgraph=True)(noise, 4)
    assert_all_equal(got, random_patch_order(noise, 4))
    got = torch.compile(random_patch_order_from_seed, fullgraph=True)(seed, **ODD.sizes)
    assert_all_equal(got, random_patch_order_from_seed(seed, **ODD.sizes))


@each_device
def test_non_contiguous_noise_that_requires_grad(device):
    noise = ODD.noise(device)
    strided = noise.T.contiguous().T.requires_grad_()
    assert not strided.is_contiguous()
    assert_all_equal(random_patch_order(strided, 4), random_patch_order(noise, 4))


@each_device
def test_same_bits_every_time(device):
    noise, seed = CASES["official"].hard_noise(device), torch.tensor(11, device=device)
    assert_all_equal(random_patch_order(noise, 81), random_patch_order(noise, 81))
    sizes = CASES["official"].sizes
    assert_all_equal(random_patch_order_from_seed(seed, **sizes), random_patch_order_from_seed(seed, **sizes))


MISTAKES = {
    "flat_noise": (torch.rand(5), 2, r"noise must be \(B, N\) float32 or float64, got \(5,\) float32"),
    "half_noise": (torch.rand(2, 5).half(), 2, r"noise must be .* got \(2, 5\) float16"),
    "too_many_kept": (torch.rand(2, 5), 6, "num_kept must be from 0 to the number of patches, 5, got 6"),
    "fewer_than_none_kept": (torch.rand(2, 5), -1, "num_kept must be from 0 .* got -1"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named(mistake):
    noise, num_kept, message = mistake
    with pytest.raises(ValueError, match=message):
        random_patch_order(noise, num_kept)


SEED_MISTAKES = {
    "seeds": ({"seed": torch.tensor([1])}, r"seed must be \(\) int64, got \(1,\) int64"),
    "float_seed": ({"seed": torch.tensor(1.0)}, r"seed must be \(\) int64, got \(\) float32"),
    "batch_size": ({"batch_size": -1}, "batch_size must be at least 0, got -1"),
    "num_patches": ({"num_patches": 2**31}, "num_patches must be .* below 2.31, got 2147483648"),
    "num_kept": ({"num_kept": 16}, "num_kept must be from 0 to the number of patches, 15, got 16"),
}


@pytest.mark.parametrize("mistake", SEED_MISTAKES.values(), ids=SEED_MISTAKES.keys())
def test_mistakes_with_a_seed_are_named(mistake):
    changes, message = mistake
    with pytest.raises(ValueError, match=message):
        random_patch_order_from_seed(**{"seed": torch.tensor(0), **ODD.sizes, **changes})
