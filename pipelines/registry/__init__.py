"""The MLflow registry: runs, versions, aliases and their history."""
