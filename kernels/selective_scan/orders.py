"""The orders in which a map's pixels are scanned, as index maps: which pixel step t reads.

Sources: VMamba, arXiv 2401.10166, section 4.2 (cross-scan); Vim, arXiv 2401.09417 (both directions of the rows).
"""

import torch

from terrazzo.errors import InputError

ORDERS = ("rows", "columns", "rows_reversed", "columns_reversed")
CROSS = ORDERS
BOTH = ("rows", "rows_reversed")


def codes(orders: tuple[str, ...]) -> list[int]:
    """The position of each order in `ORDERS`: bit 0 means columns, bit 1 reversed.

    Raises:
        InputError: `orders` is empty, or has a name that is not in `ORDERS`.
    """
    wrong = [order for order in orders if order not in ORDERS]
    if wrong or not orders:
        raise InputError(f"orders must be among {', '.join(ORDERS)}, got {wrong[0] if wrong else 'none'}")
    return [ORDERS.index(order) for order in orders]


def by_columns(code: int) -> bool:
    return bool(code & 1)


def is_reversed(code: int) -> bool:
    return bool(code & 2)


def pixels(code: int, steps: torch.Tensor, length: int, width: int) -> torch.Tensor:
    """The pixel, counted by rows, that each step of an order reads.

    Args:
        code: code of the order.
        steps: integers from 0 to length - 1, any shape.
        length: pixels of the map, height x width.
        width: width of the map.
    """
    if is_reversed(code):
        steps = length - 1 - steps
    if by_columns(code):
        height = length // width
        steps = steps % height * width + steps // height
    return steps
