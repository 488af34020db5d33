"""Public interface of the losses."""

from switchkd.losses.dbild import bild_loss, dbild_loss
from switchkd.losses.kl import kl_loss
from switchkd.losses.lm_head import LMHead
from switchkd.losses.objective import fused_dbild
from switchkd.losses.selection import kneedle
from switchkd.losses.visual_weights import visual_weights

__all__ = ["LMHead", "bild_loss", "dbild_loss", "fused_dbild", "kl_loss", "kneedle", "visual_weights"]
