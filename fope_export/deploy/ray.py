"""The server of `fope-export serve` as a Ray Serve application, on one machine or a cluster."""

from fope_export.deploy.base import Target

TARGET = Target(("openai", "ray"))
