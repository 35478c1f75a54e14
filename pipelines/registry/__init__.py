"""MLflow: runs, versions, aliases and their history."""
