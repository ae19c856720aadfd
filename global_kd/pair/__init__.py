"""Two detectors as one: their paired levels, the facts they can give, and the step they make."""

from .pair import Observed as Observed
from .pair import Pair as Pair
