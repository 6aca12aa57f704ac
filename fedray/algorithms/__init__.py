"""What gateways and the orchestrator do with parameters."""
