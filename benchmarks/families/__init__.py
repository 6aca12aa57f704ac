"""Parts of the zoo benchmark: families of models, the systems that train them, and what is written down."""

from suite import PEERS  # importing it puts the peers' folder on the path, some of whose models the families use

__all__ = ["PEERS"]
