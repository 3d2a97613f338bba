"""A memory bank of normal vectors: how far is a vector from the nearest one in it?

The bank holds the vectors that cover all others best (greedy k-center; Gonzalez, 1985; for banks of
features: Roth et al., PatchCore, CVPR 2022). A random choice would forget rare normal vectors, and
those decide false rejects. A Gaussian kernel turns distances into likelihoods relative to a perfect
match, which can be averaged with those of a flow. Its width comes from the training vectors.

Legend: B images, P positions, C channels, M vectors in the bank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_CANDIDATES = 100_000  # vectors to choose from; more cost time and cover little more
# Dimensions in which coverage is judged. Random projections keep distances (Johnson and
# Lindenstrauss, 1984).
_PROJECTION = 64
_WIDTH_SAMPLE = 20_000
_WIDTH_QUANTILE = 0.99  # this share of the normal vectors gets a likelihood of one half or more


class MemoryBank(nn.Module):
    """Normal vectors of one level.

    Args:
        size: M.
        channels: C.
    """

    vectors: Tensor
    width: Tensor

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(size, channels))
        self.register_buffer("width", torch.ones(()))

    @torch.no_grad()
    def fit(self, vectors: Tensor, rows: Tensor, seed: int) -> None:
        """Choose the bank's vectors and the kernel's width.

        Args:
            vectors: (N, C), any float type.
            rows: (K,) int64, indices of the vectors to choose from.
            seed: decides candidates and projection.
        """
        generator = torch.Generator().manual_seed(seed)
        chosen = rows[torch.randperm(len(rows), generator=generator)[:_CANDIDATES]]
        candidates = vectors[chosen].float().to(self.vectors.device)
        projection = torch.randn(candidates.shape[1], _PROJECTION, generator=generator).to(
            candidates.device
        )
        projected = candidates @ projection if candidates.shape[1] > _PROJECTION else candidates
        self.vectors.copy_(candidates[cover(projected, len(self.vectors))])
        sample = candidates[:_WIDTH_SAMPLE]
        distances = torch.cat(
            [self.squared_distances(rows[None])[0] for rows in sample.split(4096)]
        ).sqrt()
        rank = min(len(distances) - 1, int(_WIDTH_QUANTILE * len(distances)))
        self.width.copy_(distances.sort().values[rank].clamp_min(1e-6))

    def squared_distances(self, features: Tensor) -> Tensor:
        """Squared distance to the nearest vector in the bank.

        Args:
            features: (B, P, C).

        Returns:
            (B, P) float32.
        """
        # |x - v|^2 = |x|^2 - 2 x v + |v|^2 is fast, but exact near the origin only: move the
        # vectors there.
        centre = self.vectors.mean(dim=0)
        vectors = self.vectors - centre
        norms = vectors.square().sum(dim=1)
        if torch.compiler.is_compiling():
            # A loop over the images would fix their number in an exported network.
            rows = features.float() - centre
            products = (norms - 2 * (rows @ vectors.t())).amin(dim=2)
            return (rows.square().sum(dim=2) + products).clamp_min(0)
        nearest = []
        for image in features.float():  # all distances of a batch at once would fill the memory
            rows = image - centre
            products = torch.addmm(norms, rows, vectors.t(), alpha=-2)  # (P, M)
            nearest.append(products.amin(dim=1) + rows.square().sum(dim=1))
        return torch.stack(nearest).clamp_min(0)

    def forward(self, features: Tensor) -> Tensor:
        """Likelihood relative to a perfect match, one half at the kernel's width.

        Args:
            features: (B, P, C).

        Returns:
            (B, P) float32 in [0, 1].
        """
        return torch.exp2(-self.squared_distances(features) / self.width.square())


def cover(points: Tensor, size: int) -> Tensor:
    """Indices (size,) of points (N, D) that cover all points.

    The first point comes first; each next one is the point that is farthest from those before.
    """
    norms = points.square().sum(dim=1)
    distances = torch.full_like(norms, torch.inf)
    place = torch.zeros((), dtype=torch.int64, device=points.device)
    chosen = []
    for _ in range(size):
        chosen.append(place)
        point = points[place]
        torch.minimum(distances, norms - 2 * (points @ point) + point.square().sum(), out=distances)
        place = distances.argmax()
    return torch.stack(chosen)
