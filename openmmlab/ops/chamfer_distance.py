"""The chamfer distance: for each point of a set, the squared distance to the nearest point of another set."""

from torch import Tensor


def chamfer_distance_forward(
    xyz1: Tensor, xyz2: Tensor, dist1: Tensor, dist2: Tensor, idx1: Tensor, idx2: Tensor
) -> None:
    """Fills the distances and the indices of the nearest points.

    Args:
        xyz1: B x N x 2.
        xyz2: B x M x 2.
        dist1: B x N, filled: squared distances of the first points to the second set.
        dist2: B x M, filled: the same the other way round.
        idx1: B x N int32, filled: the nearest points.
        idx2: B x M int32, filled.
    """
    squared = (xyz1.unsqueeze(2) - xyz2.unsqueeze(1)).square().sum(-1)
    for dim, dist, idx in ((2, dist1, idx1), (1, dist2, idx2)):
        found = squared.min(dim)
        dist.copy_(found.values)
        idx.copy_(found.indices)


def chamfer_distance_backward(
    xyz1: Tensor,
    xyz2: Tensor,
    idx1: Tensor,
    idx2: Tensor,
    grad_dist1: Tensor,
    grad_dist2: Tensor,
    grad_xyz1: Tensor,
    grad_xyz2: Tensor,
) -> None:
    """Fills the gradients of the points; each pair moves both of its points.

    Args:
        xyz1: as in `chamfer_distance_forward`.
        xyz2: likewise.
        idx1: the nearest points that were found.
        idx2: likewise.
        grad_dist1: B x N, the gradient of `dist1`.
        grad_dist2: B x M.
        grad_xyz1: B x N x 2, zero; filled.
        grad_xyz2: B x M x 2, zero; filled.
    """
    pairs = ((xyz1, xyz2, idx1, grad_dist1, grad_xyz1, grad_xyz2), (xyz2, xyz1, idx2, grad_dist2, grad_xyz2, grad_xyz1))
    for points, others, idx, grad, grad_points, grad_others in pairs:
        index = idx.long().unsqueeze(-1).expand(-1, -1, points.shape[-1])
        step = 2 * grad.unsqueeze(-1) * (points - others.gather(1, index))
        grad_points += step
        grad_others.scatter_add_(1, index, -step)
