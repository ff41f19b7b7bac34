"""Axial attention of Axial-VS with one frame: along the columns of a map, then along its rows.

Paper: A Simple Video Segmenter by Tracking Objects Along Axial Trajectories, TMLR 2024, arXiv 2311.18537; axial
attention after Ho et al., Axial Attention in Multidimensional Transformers, 2019, arXiv 1912.12180.
"""

import torch
import torch.nn.functional as F

from terrazzo.backbones._place import Place
from terrazzo.backbones.mixers._mixer import Mixer, softmax_matrix


class Axial(Mixer):
    """out = A_rows (A_columns v): softmax attention inside each column, and of its results inside each row.

    The attention matrix is a product of two: a patch reads each patch of the map, by way of the patch of its own row in
    that patch's column. Queries and keys are the same in both. The cost is 2 N (H + W) D instead of 2 N^2 D for N = H W
    patches. Axial trajectory attention along a clip becomes this for one frame, up to its projections between both
    attentions (`terrazzo.clips.AxialTrajectoryLayer` has them).

    Ours: tokens in front are keys of every token in both attentions, with their own values, and attend to every token.

    Source: arXiv 2311.18537, section 3.2.
    """

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        front = F.scaled_dot_product_attention(query[:, :, : place.prefix], key, value)
        mixed = value
        for columns in (True, False):
            mixed = torch.cat([value[:, :, : place.prefix], _lines(query, key, mixed, place, columns)], 2)
        return torch.cat([front, mixed[:, :, place.prefix :]], 2)

    def weights(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place) -> torch.Tensor:
        count = query.shape[2]
        identity = torch.eye(count, dtype=query.dtype, device=query.device).expand(*query.shape[:2], -1, -1)
        mixed = self.mix(query, key, identity, place)
        return torch.cat([softmax_matrix(query, key, place)[:, :, : place.prefix], mixed[:, :, place.prefix :]], 2)


def _lines(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: Place, columns: bool) -> torch.Tensor:
    """The patches (B, heads, H W, D) after attention to the tokens in front and to patches of their column or row."""

    def cut(x: torch.Tensor) -> torch.Tensor:
        x = x[:, :, place.prefix :].unflatten(2, place.grid)  # B heads H W D
        return x.transpose(2, 3) if columns else x

    def with_front(x: torch.Tensor) -> torch.Tensor:
        lines = cut(x)
        return torch.cat([x[:, :, None, : place.prefix].expand(-1, -1, lines.shape[2], -1, -1), lines], 3)

    lines = cut(query)
    given = (x.flatten(0, 2) for x in (lines, with_front(key), with_front(value)))
    out = F.scaled_dot_product_attention(*(x.unsqueeze(1) for x in given)).squeeze(1).unflatten(0, lines.shape[:3])
    return (out.transpose(2, 3) if columns else out).flatten(2, 3)
