"""Detectors as the distiller sees them: the protocol, pixels, and one thin file per framework."""

from .fingerprint import fingerprint as fingerprint
from .frameworks import detector_of as detector_of
from .frameworks import register_framework as register_framework
from .module import ModuleDetector as ModuleDetector
from .module import as_targets as as_targets
from .own_head import ReadHead as ReadHead
from .pixels import IMAGENET as IMAGENET
from .pixels import Pixels as Pixels
from .pixels import View as View
from .pixels import translate as translate
from .protocol import Detections as Detections
from .protocol import Detector as Detector
from .protocol import Look as Look
from .protocol import MapsOnly as MapsOnly
from .protocol import Sampled as Sampled
from .protocol import Seen as Seen
from .reading import reader as reader
