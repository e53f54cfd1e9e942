"""refq4 (being built)."""
from .registry import *
