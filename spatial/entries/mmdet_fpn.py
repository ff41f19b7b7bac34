"""mmdet's FPN, which resizes maps to the sizes of others."""

from terrazzo.spatial._entries import Entry
from terrazzo.spatial._functions import through

ENTRIES = {"FPN": Entry(through)}
