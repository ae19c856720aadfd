"""One file a method: the function first, the module as its shell."""

from .base import DistillLoss as DistillLoss
from .base import Levels as Levels
from .bckd import BCKD as BCKD
from .cosine import Cosine as Cosine
from .crosskd import CrossKD as CrossKD
from .cwd import CWD as CWD
from .defeat import DeFeat as DeFeat
from .detrdistill import DETRDistill as DETRDistill
from .dicod import DICOD as DICOD
from .fbkd import FBKD as FBKD
from .fgd import FGD as FGD
from .fgfi import FGFI as FGFI
from .frs import FRS as FRS
from .gid import GID as GID
from .ld import LD as LD
from .logits import SoftLabels as SoftLabels
from .mgd import MGD as MGD
from .pfi import PFI as PFI
from .pkd import PKD as PKD
from .robust_distill import LabelOptions as LabelOptions
from .robust_distill import RelationOptions as RelationOptions
from .tar import TAR as TAR
