"""A model in use: served over HTTP, and watched for drift."""
