"""Several processes: how they meet, watch each other and exit together."""
