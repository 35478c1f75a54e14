"""The gate's old place, for code that is being changed beside this move."""

from pipelines.gate import Decision, GateFacts, Policy, decide, load_policy, read_policy

__all__ = ["Decision", "GateFacts", "Policy", "decide", "load_policy", "read_policy"]
