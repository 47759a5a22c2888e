"""HRNet and its mathematics: backbone, heads, codecs, losses, weights. Knows no task, no data set and no Trainer."""

from hrnet.backbone import PRESETS, HRNet, HRNetConfig

__all__ = ["PRESETS", "HRNet", "HRNetConfig"]
