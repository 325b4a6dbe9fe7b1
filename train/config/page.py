"""The options of the web page."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """Serve a web page to generate images, train, look at data and compare models in a browser.

    It answers only this machine, unless --listen or --share is given. It reads and writes nothing outside the four
    folders.
    """

    models: str = "runs"
    """Folder in which models are searched, at any depth up to five. Visitors can use all of them."""
    runs: str = "runs"
    """Folder of the training runs. Visitors can see them, and start, stop and continue them.
    Comparisons of two models and their votes are written to compare/ in it."""
    data: str = "data"
    """Folder of the datasets. Visitors can see the images and captions."""
    out: str = "out"
    """Folder of the images that visitors generate or upload, and of reports on datasets.
    Visitors can see all images in it."""
    host: str = "127.0.0.1"
    """Address to answer at. Another address than that of this machine itself needs --listen."""
    port: int = 7860
    """Port to answer at."""
    listen: bool = False
    """Answer the whole network, at 0.0.0.0 unless --host is given. Everybody in it can use the page, so add --auth."""
    auth: str = ""
    """NAME:PASSWORD that visitors must give. It is sent unencrypted over --listen. Empty: no password."""
    share: bool = False
    """Make the page reachable from the internet through a tunnel of gradio's company, which sees all that is sent.
    Needs --auth."""
    device: str = ""
    """Device to run on, e.g. cpu, cuda:1 or mps; empty: the GPU if there is one (cuda or Apple's mps), else the CPU."""
