"""Floor 0: the mathematics of diffusion ODEs. Needs torch and nothing else; knows no network, file, device or rank."""
