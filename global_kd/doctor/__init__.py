"""What one step tells about a distillation set-up, before the first epoch."""

from .examine import examine as examine
from .report import Level as Level
from .report import Report as Report
from .report import Term as Term
