"""What one step tells about a distillation set-up, before the first epoch."""

from .alarm import Alarm as Alarm
from .calibration import Calibration as Calibration
from .examine import examine as examine
from .report import Level as Level
from .report import Report as Report
from .report import Term as Term
from .shares import HeldShares as HeldShares
from .teacher import FindObjects as FindObjects
from .trial import Setup as Setup
from .watch import Watch as Watch
