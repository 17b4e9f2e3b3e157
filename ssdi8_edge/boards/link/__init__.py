"""Reaching a machine: addresses, SSH, and what every connection guarantees."""
