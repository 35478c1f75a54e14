"""The lower baseline: one shared head, fine-tuned on task after task, that nothing protects."""

from partialhn.strategies.shared_head import SharedHead


class Naive(SharedHead):
    """Fine-tuning without protection; its forgetting is what other strategies are compared with."""
