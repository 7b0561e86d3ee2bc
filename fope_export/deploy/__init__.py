"""The table of servers that a bundle can be handed to. A new one is a module here whose TARGET says what its folder
holds, that in `files/`, and a row.
"""

TARGETS = {
    "dynamo": "NVIDIA Dynamo's frontend, and workers around our engine, on one machine or many",
    "ray": "the server of `fope-export serve` as a Ray Serve application, on one machine or a cluster",
    "docker": "an image with `fope-export serve`, Prometheus and a Grafana dashboard",
    "triton": "NVIDIA Triton, with the engine in its Python backend",
}
"""Name, also of the module -> what it is."""
PROMPT = "def main("
"""What a server is asked, to see that it answers as the bundle does."""
