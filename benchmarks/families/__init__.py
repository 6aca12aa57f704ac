"""Parts of the zoo benchmark: families of models, the systems that train them, and what is written down."""
