"""What one step tells about a distillation set-up, before the first epoch."""

from .calibration import Calibration as Calibration
from .calibration import measure as measure
from .calibration import weights_for as weights_for
from .examine import examine as examine
from .report import Level as Level
from .report import Report as Report
from .report import Term as Term
