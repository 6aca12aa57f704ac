"""What makes training private: constants, sampling, clipping, noise, accounting, ledger. Knows no gateway and no Ray."""
