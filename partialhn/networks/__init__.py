"""The networks: a frozen trunk, the head above it, and the hypernetwork that generates it."""
