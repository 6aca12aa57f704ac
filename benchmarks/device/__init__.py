"""Parts of the GPU benchmark. Nothing here imports Ray; Opacus is imported by its own rows alone."""
