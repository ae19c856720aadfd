"""The whole method at the size of a test."""

from global_kd import GlobalKnowledgeLoss


def small_loss(num_classes, **options):
    """All four terms, for some steps on small scenes, with prototypes after two."""
    defaults = {
        "total_steps": 20,
        "refresh_every": 2,
        "min_side": 4,
        "finest_scale": 12,
        "relation": 5,  # off by default
    }
    return GlobalKnowledgeLoss(num_classes, **(defaults | options))
