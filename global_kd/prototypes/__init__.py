"""Prototypes: selecting them (pure), collecting rows for them, keeping them."""

from .bank import PrototypeBank as PrototypeBank
from .generator import PrototypeGenerator as PrototypeGenerator
