"""Knowledge-distillation losses for object detectors; global knowledge (ECCV 2022) first.

Importing this package imports torch and numpy, nothing else.
"""

from . import functional as functional
from ._version import __version__ as __version__
from .detectors import Pixels as Pixels
from .distiller import Distiller as Distiller
from .hooks import FeatureTap as FeatureTap
from .hooks import Pyramid as Pyramid
from .hooks import find_pyramids as find_pyramids
from .losses.global_knowledge import GlobalKnowledgeLoss as GlobalKnowledgeLoss
from .losses.robust_distill import PAPER as PAPER
from .losses.robust_distill import RobustDistillLoss as RobustDistillLoss
from .prototypes.bank import PrototypeBank as PrototypeBank
from .prototypes.generator import PrototypeGenerator as PrototypeGenerator
from .schedules import Schedule as Schedule
from .targets import Targets as Targets

__all__ = [
    "Distiller",
    "FeatureTap",
    "GlobalKnowledgeLoss",
    "PAPER",
    "Pixels",
    "PrototypeBank",
    "PrototypeGenerator",
    "Pyramid",
    "RobustDistillLoss",
    "Schedule",
    "Targets",
    "find_pyramids",
    "functional",
]
