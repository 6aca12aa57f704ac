"""Local training: the reference trainer over Opacus and the batched one. Imports neither Ray nor the pools."""
