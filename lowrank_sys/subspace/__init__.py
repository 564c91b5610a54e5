"""Choosing, storing and refreshing a basis, and carrying moments across a refresh."""
