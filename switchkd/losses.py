"""The public losses, in one place."""

from switchkd.dbild import bild_loss, dbild_loss
from switchkd.divergences import kl_loss
from switchkd.kneedle import kneedle

__all__ = ["bild_loss", "dbild_loss", "kl_loss", "kneedle"]
