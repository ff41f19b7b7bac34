"""Every backbone, registered with timm on import."""

from terrazzo.backbones import attnet as attnet
from terrazzo.backbones import dinat as dinat
from terrazzo.backbones import dualtokenvit as dualtokenvit
from terrazzo.backbones import s2aformer as s2aformer
