"""Who runs next: a pure state machine over host integers. No torch, no I/O, no clock of its own."""

from sglang_core.scheduler.config import SchedulerConfig
from sglang_core.scheduler.scheduler import Scheduler

__all__ = ["Scheduler", "SchedulerConfig"]
