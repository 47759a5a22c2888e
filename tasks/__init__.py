"""The marriage of network and data: one LightningModule and one command line a task."""
