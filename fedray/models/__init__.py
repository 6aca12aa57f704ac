"""Reference models, a user's own, their checks, and the layout of the flat vector of parameters."""
