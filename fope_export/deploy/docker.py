"""An image with `fope-export serve`, on a CPU or a GPU, beside Prometheus and a Grafana dashboard."""

import json
import re
from collections.abc import Mapping

from fope_export.deploy.base import Target


def _values(common: Mapping[str, str]) -> dict[str, str]:
    """The name as images and projects may be called, and options as a list."""
    slug = re.sub(r"[^a-z0-9]+", "-", common["name"].lower()).strip("-")
    return {"slug": slug, "arguments": json.dumps(common["options"].split())[1:-1]}


TARGET = Target(("openai", "docker"), values=_values)
