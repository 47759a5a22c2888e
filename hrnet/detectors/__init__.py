"""Detectors on the HRNetV2p pyramid, each with `loss(maps, batch)` and `detect(maps, batch)`."""
