"""The store of trajectories, or of pictures' latents: written once, read by every method (see `writer`, `loader`)."""
