"""The platform under the pipelines: storage, leases, the Ray cluster, progress, text tables."""
