"""Detectors on the HRNetV2p pyramid; each a class of a file here, chosen by `detector:`."""
