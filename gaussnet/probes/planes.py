"""Score fields on a plane through three images, as in Fig. 11 and 13 of arXiv 2412.09726.

Three images x_0, x_1, x_2 span a plane. With orthonormal axes e_u along x_1 - x_0 and e_v in the plane,

    x(u, v) = x_0 + u e_u + v e_v,        (s_u, s_v) = (e_u . s, e_v . s) for the score s(x(u, v), sigma),

so that u and v are distances in the space of images. The points lie on the plane itself: at noise level sigma
noised images are about sigma sqrt(D) away from it, and networks are asked there what they were not trained
on. sigma^2 s = D - x is where a denoiser moves a point to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from gaussnet.denoisers import Denoiser
from gaussnet.numerics import Sigma, check_floating, wide_dtype

_INDEPENDENT = 1e-6  # of the distance of two images, that a third is away from their line at least


@dataclass(frozen=True)
class Plane:
    """A plane in the space of images.

    Attributes:
        origin: its point (0, 0), shape (*event_shape).
        axes: orthonormal, shape (2, *event_shape).
        anchors: coordinates of the images that span it, (3, 2), in float64.
    """

    origin: Tensor
    axes: Tensor
    anchors: Tensor

    @classmethod
    def through(cls, images: Tensor) -> Self:
        """The plane through three images: the first is its origin, the second lies on the u axis.

        Args:
            images: floating, (3, *event_shape).

        Raises:
            TypeError: if they are integers.
            ValueError: if there are not three, or they lie on one line.

        Example:
            >>> Plane.through(torch.tensor([[0.0, 0.0, 1.0], [3.0, 0.0, 1.0], [1.0, 2.0, 1.0]])).anchors
            tensor([[0., 0.],
                    [3., 0.],
                    [1., 2.]], dtype=torch.float64)
        """
        if images.ndim < 2 or len(images) != 3:
            raise ValueError(f"expected three images (3, *event_shape), got shape {tuple(images.shape)}")
        check_floating(images=images)
        flat = images.detach().cpu().double().flatten(1)
        first, second = flat[1] - flat[0], flat[2] - flat[0]
        e_u = first / first.norm()
        across = second - (e_u @ second) * e_u
        if not float(across.norm()) > _INDEPENDENT * float(first.norm() + second.norm()):
            raise ValueError("expected three images that span a plane, got images on one line")
        axes = torch.stack([e_u, across / across.norm()])
        return cls(
            images[0].detach(),
            axes.reshape(2, *images.shape[1:]).to(images),
            torch.stack([first.new_zeros(2), axes @ first, axes @ second]),
        )

    def points(self, uv: Tensor) -> Tensor:
        """The images at coordinates (n, 2); shape (n, *event_shape)."""
        return self.origin + torch.einsum("nk,k...->n...", uv.to(self.axes), self.axes)

    def project(self, vectors: Tensor) -> Tensor:
        """The components (n, 2) in the plane of vectors (n, *event_shape), in float64."""
        wide = vectors.to(wide_dtype(vectors.device))
        return wide.flatten(1) @ self.axes.to(wide).flatten(1).mT

    def grid(self, size: int, margin: float = 0.35) -> Tensor:
        """A square grid of coordinates (size^2, 2) about the anchors, v outer, u inner.

        Args:
            size: points a side.
            margin: on each side, relative to the longer side of the rectangle about the anchors.

        Raises:
            ValueError: if size < 2 or margin < 0.
        """
        if size < 2 or margin < 0:
            raise ValueError(f"expected size >= 2 and margin >= 0, got {size} and {margin}")
        low, high = self.anchors.amin(0), self.anchors.amax(0)
        centre, half = (low + high) / 2, (0.5 + margin) * (high - low).max()
        steps = torch.linspace(-1, 1, size, dtype=torch.float64)
        v, u = torch.meshgrid(centre[1] + half * steps, centre[0] + half * steps, indexing="ij")
        return torch.stack([u.flatten(), v.flatten()], 1)

    def inside(self, uv: Tensor) -> Tensor:
        """Which coordinates (n, 2) lie in the triangle of the anchors; boolean (n,)."""
        anchors = self.anchors.to(uv)
        edges = anchors[1:].mT - anchors[:1].mT
        barycentric = torch.linalg.solve(edges, (uv - anchors[0]).mT)  # (2, n)
        return (barycentric >= 0).all(0) & (barycentric.sum(0) <= 1)


@torch.no_grad()
def score_field(
    denoiser: Denoiser,
    plane: Plane,
    uv: Tensor,
    sigma: Sigma,
    class_labels: Tensor | None = None,
    batch_size: int = 256,
) -> list[dict[str, Any]]:
    """A score on the plane.

    Args:
        denoiser: whose score.
        plane: of images of its event shape, on its device.
        uv: coordinates, (n, 2).
        sigma: noise level, one for all, a number or 0-d.
        class_labels: one class for all points, an integer of shape () or a one-hot row.
        batch_size: points in one evaluation.

    Returns:
        A row a point: u, v; score_u, score_v, the components in the plane; norm of the whole score,
        norm_in_plane of these two, in units of 1/distance; inside, whether the point lies in the triangle of
        the three images.

    Raises:
        ValueError: as the denoiser.

    Example:
        >>> from gaussnet import GaussianDenoiser
        >>> gaussian = GaussianDenoiser.isotropic(torch.zeros(3), 1.0)
        >>> plane = Plane.through(torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 0.0], [0.0, 3.0, 0.0]]))
        >>> row = score_field(gaussian, plane, torch.tensor([[1.0, 1.0]]), sigma=1.0)[0]
        >>> row["score_u"], row["score_v"], row["inside"]  # -x/(1 + 1)
        (-0.5, -0.5, True)
    """
    rows: list[dict[str, Any]] = []
    for part, inside in zip(uv.split(batch_size), plane.inside(uv).split(batch_size), strict=True):
        x = plane.points(part)
        labels = None if class_labels is None else class_labels.expand(len(x), *class_labels.shape)
        score = denoiser.score(x, sigma, labels)
        projected = plane.project(score)
        norms = torch.stack([score.to(projected.dtype).flatten(1).norm(dim=1), projected.norm(dim=1)])
        columns = torch.cat([part.T, projected.T.cpu(), norms.cpu()]).T  # (n, 6)
        rows += [
            {
                "u": u,
                "v": v,
                "score_u": score_u,
                "score_v": score_v,
                "norm": norm,
                "norm_in_plane": in_plane,
                "inside": within,
            }
            for (u, v, score_u, score_v, norm, in_plane), within in zip(
                columns.tolist(), inside.tolist(), strict=True
            )
        ]
    return rows
