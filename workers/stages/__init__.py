"""The four stages of the flow; each module holds one `gather` and one `decide`."""

from workers.stages.step import StageFunctions, StagePorts, Step, Stopwatch

__all__ = ["StageFunctions", "StagePorts", "Step", "Stopwatch"]
