"""MedMamba: convolutions beside cross-scans."""

from terrazzo.spatial._entries import OWN

ENTRIES = dict.fromkeys(("MedMamba", "SSConvSSMBlock"), OWN)
