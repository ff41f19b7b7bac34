"""Every backbone, registered with timm on import."""

from terrazzo.backbones import dinat as dinat
