"""Scheduled retraining: from what arrives to a champion."""
