"""Settings of the libraries that keep them from sending requests and from slow imports, made before their import."""

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from ldm.imports import defer


def isolate(out: Path) -> None:
    """Keep all libraries from sending requests, and gradio's files in `out`. Call it before gradio is imported."""
    cache = out.absolute() / "cache"
    if "gradio" not in sys.modules:
        sys.meta_path.insert(0, _WithoutTypeFiles())
        defer("pandas")  # gradio needs it for tables, which the page doesn't have
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(2**31),  # events until a table of events is made, with pandas
        "GRADIO_TEMP_DIR": str(cache),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }


class _WithoutTypeFiles(MetaPathFinder):
    """Import hook that keeps gradio from writing a file of types beside the source of each of its fields.

    Its folder may be read-only, and this takes two fifths of the time to import gradio.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of gradio's module that writes the files; None for all others."""
        if fullname != "gradio.component_meta" or not (spec := PathFinder.find_spec(fullname, path)) or not spec.loader:
            return None
        load = spec.loader.exec_module

        def without_writing(module: ModuleType) -> None:
            load(module)
            vars(module)["create_or_modify_pyi"] = lambda *_: None

        vars(spec.loader)["exec_module"] = without_writing
        return spec
