"""What an executor is asked, what it answers, and what it measures."""

from .requests import ExecutorOutput, ExecutorRequest, StageTimes


__all__ = ["ExecutorOutput", "ExecutorRequest", "StageTimes"]
