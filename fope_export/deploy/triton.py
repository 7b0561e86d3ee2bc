"""NVIDIA Triton with our engine in its Python backend: a model repository, and a program that starts the server."""

from fope_export.deploy.base import Target

TARGET = Target(("triton",), bundle="models/@@name/1/bundle")
