"""timm's wrappers for features."""

from terrazzo.spatial._entries import OWN

ENTRIES = dict.fromkeys(("FeatureListNet", "FeatureDictNet", "FeatureGetterNet"), OWN)
