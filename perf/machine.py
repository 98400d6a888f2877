"""What a measurement was taken on and with: written into every result."""

from launch.environment import describe_machine

__all__ = ["describe_machine"]
