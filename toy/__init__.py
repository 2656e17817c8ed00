"""The toy worlds every script runs on by default: small enough to know the right answer."""
