"""Settings of the libraries that keep them from sending requests, made before they are imported."""

import os
from pathlib import Path


def isolate(out: Path) -> None:
    """Keep all libraries from sending requests, and gradio's files in `out`. Call it before the page is built."""
    cache = out.absolute() / "cache"
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(cache),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
