"""The stages of `prepare`, one job each: see `mm_lightning.prepare.sample.Stage`."""
