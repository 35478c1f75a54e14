"""The search over freeze depths."""
