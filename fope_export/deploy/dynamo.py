"""NVIDIA Dynamo: its frontend, and workers around our engine, on one machine or many."""

from fope_export.deploy.base import Target

TARGET = Target(("openai", "dynamo"))
