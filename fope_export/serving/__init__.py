"""Requests in, tokens out, on any backend."""
