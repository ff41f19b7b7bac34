"""Every backbone, registered with timm on import."""

from terrazzo.backbones import asvit as asvit
from terrazzo.backbones import attnet as attnet
from terrazzo.backbones import dinat as dinat
from terrazzo.backbones import dualtokenvit as dualtokenvit
from terrazzo.backbones import mambavision as mambavision
from terrazzo.backbones import mctf as mctf
from terrazzo.backbones import medmamba as medmamba
from terrazzo.backbones import roma as roma
from terrazzo.backbones import s2aformer as s2aformer
from terrazzo.backbones import vmamba as vmamba
