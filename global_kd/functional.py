"""The pure core in one place: functions of tensors, no state, no frameworks.

Rows are ``(R, C)``, boxes xyxy in pixels of the padded network input, student before teacher, the
teacher detached. Sums are taken in at least float32, also under autocast.
"""

from .instances import pool_boxes
from .losses.cosine import cosine_loss
from .losses.cwd import cwd_loss
from .losses.detrdistill import query_guided_loss
from .losses.fbkd import attention_guided_loss
from .losses.fgd import fgd_loss
from .losses.fgfi import anchor_mask
from .losses.frs import richness_loss
from .losses.gid import select_instances
from .losses.imitation import imitation_loss
from .losses.ld import localization_loss
from .losses.logits import logit_loss
from .losses.pfi import prediction_guided_loss, rank_loss
from .losses.pkd import pkd_loss
from .losses.relation import relation_loss
from .losses.tar import gaussian_mask
from .prototypes.select import density_candidates, select_prototypes
from .robust import confidence_weights, robust_weights

__all__ = [
    "anchor_mask",
    "attention_guided_loss",
    "confidence_weights",
    "cosine_loss",
    "cwd_loss",
    "density_candidates",
    "fgd_loss",
    "gaussian_mask",
    "imitation_loss",
    "localization_loss",
    "logit_loss",
    "pkd_loss",
    "pool_boxes",
    "query_guided_loss",
    "prediction_guided_loss",
    "rank_loss",
    "relation_loss",
    "richness_loss",
    "robust_weights",
    "select_instances",
    "select_prototypes",
]
