"""What the pipeline stands on: storage, leases, the Ray cluster, progress, text tables."""
