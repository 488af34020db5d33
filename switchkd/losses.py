"""The public losses, in one place."""

from switchkd.dbild import bild_loss, dbild_loss
from switchkd.divergences import kl_loss
from switchkd.fused import LMHead
from switchkd.objective import fused_dbild
from switchkd.selection import kneedle

__all__ = ["LMHead", "bild_loss", "dbild_loss", "fused_dbild", "kl_loss", "kneedle"]
