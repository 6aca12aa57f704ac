"""Where gateways run: in Ray actors or in this process, under one law."""
