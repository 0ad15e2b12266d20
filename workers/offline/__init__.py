"""Work that is done once, far from any event: models are trained here, and nothing here decides."""
